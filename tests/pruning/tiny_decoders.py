"""Tiny random decoders, samples and reference activations for the pruning tests."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from made_tensors import seeded, token_rows
from tiny_families import family_model
from transformers import PreTrainedModel

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import Samples

VOCABULARY = 60
PAD = 0
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "tie_word_embeddings": True,
    "layer_types": None,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED | {"head_dim": 8},
    # A window shorter than the samples, in every second block.
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 4},
    "granite": GROUPED | {"residual_multiplier": 0.4},
    # Query and key norms over all heads.
    "olmo2": GROUPED,
    "phi3": GROUPED,
    "opt": {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    # Attention and MLP side by side.
    "gpt_neox": {"num_attention_heads": 4, "intermediate_size": 48},
}


def tiny(name: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    """Build three float32 blocks with weights large enough that every unit changes the logits."""
    return family_model(name, seed, **SIZES | FAMILIES[name] | options)


class MemoryWitness:
    """Count, each time tensors are seen, how many of those seen before are still in memory."""

    def __init__(self) -> None:
        self.num_alive: list[int] = []
        self._seen: list[weakref.ref[torch.Tensor]] = []

    def see(self, *tensors: torch.Tensor) -> None:
        self.num_alive.append(sum(reference() is not None for reference in self._seen))
        self._seen += map(weakref.ref, tensors)


def settings_of(**options: Any) -> PruneConfig:
    """Make settings with first-order Taylor per layer, no compensation and no rounding, whatever
    the defaults are."""
    recipe: dict[str, Any] = {"compensation": "none"}
    if list(options.get("units", ())) != ["block"]:
        recipe |= {"importance": "taylor", "selection": "per_layer", "round_to": 1, "steps": 1}
    return PruneConfig.model_validate(recipe | options)


def keys(text: str) -> dict[str, Any]:
    """Read keys of the section `prune` as users write them."""
    return dict(yaml.safe_load(f"{{{text}}}"))


def rows_of(lengths: Sequence[int], seed: int = 1) -> list[dict[str, list[int]]]:
    generator = seeded(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def samples_of(
    lengths: Sequence[int] = (9, 16, 12, 7, 16), seed: int = 1, batch_size: int = 8
) -> Samples:
    """Make samples of different lengths, so that most batches are padded."""
    return Samples(rows_of(lengths, seed), PAD, batch_size)


@torch.no_grad()
def logits_of(model: PreTrainedModel, seed: int = 5) -> torch.Tensor:
    """Compute logits ``(2, 11, vocabulary)`` of a prompt that is in no sample."""
    prompt = torch.tensor(token_rows(2, 11, seed, VOCABULARY))
    logits: torch.Tensor = model(input_ids=prompt, use_cache=False).logits
    return logits


@torch.no_grad()
def stacked_inputs(model: PreTrainedModel, linear: str, samples: Samples) -> torch.Tensor:
    """Return the inputs ``(tokens, features)`` of a linear layer in float64, sample by sample
    without padding."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(linear).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())
    )
    for row in samples.rows:
        model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    handle.remove()
    return torch.cat(seen)
