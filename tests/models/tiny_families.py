"""A tiny random model of every supported family, of that family's own class, and cuts to try on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qpruner.models import ragged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIDDEN, HEAD_DIM, CHANNELS, LAYERS = 48, 12, 40, 3
QUERY_HEADS, KEY_VALUE_HEADS = 6, 3
FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3")

KEPT = {
    0: {"attention": (0, 2), "mlp": (*range(3, 20), 38)},
    2: {"attention": (1,), "mlp": tuple(range(0, 40, 3))},
}
"""Blocks 0 and 2 get different widths, block 1 keeps its own."""


def family_model(name: str) -> PreTrainedModel:
    """Three float32 blocks, two query heads to a key/value head; norms and biases are random, not one and zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ragged.install()  # as loading does
    # Qwen2's config has no head size of its own; Mistral's window is shorter than the prompt.
    options = {"qwen2": {}, "mistral": {"head_dim": HEAD_DIM, "sliding_window": 6}}.get(name, {"head_dim": HEAD_DIM})
    config = AutoConfig.for_model(
        name,
        vocab_size=97,
        hidden_size=QUERY_HEADS * HEAD_DIM if name == "qwen2" else HIDDEN,
        intermediate_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=name in ("llama", "qwen3"),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    torch.manual_seed(FAMILY_NAMES.index(name))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.0 if key.endswith("bias") else 1.0))
            else:
                # Larger than transformers' 0.02, so that every part of a block shows in the logits.
                parameter.mul_(6.0)
    return model.eval()


def prompt() -> torch.Tensor:
    """Token ids ``(2, 9)``."""
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=prompt(), use_cache=False).logits
    return logits
