"""Tiny random decoders whose groups lie in a real bank, and samples to score them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mixed_models import fill_bank

from qpruner.config.schema import LoraConfig
from qpruner.data.calibration import Samples
from qpruner.models import ragged
from qpruner.models.layout import group_linears
from qpruner.quantization.bank import Starts
from qpruner.sensitivity.methods import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY, PAD, LEVELS = 60, 0, (4, 8, 16)
LORA = LoraConfig(rank=2, alpha=6)
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "max_position_embeddings": 64, "num_hidden_layers": 3}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD, "tie_word_embeddings": True}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**HEADS, "head_dim": 16, "intermediate_size": 128},
    # A window shorter than the samples in every second block, and logits that are capped after the head.
    "gemma2": {**HEADS, "head_dim": 16, "intermediate_size": 128, "sliding_window": 4},
    # Query, key and value in one matrix, gate and up in another.
    "phi3": {**HEADS, "intermediate_size": 128},
    # Biases; attention and MLP side by side.
    "gpt_neox": {"num_attention_heads": 4, "intermediate_size": 128},
    # Experts, which no group holds.
    "mixtral": {**HEADS, "head_dim": 16, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny(name: str = "llama", **options: Any) -> PreTrainedModel:
    """Three float32 blocks of a family, wide enough in their weights that every group shows in the predictions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ragged.install()  # as loading does
    config = AutoConfig.for_model(name, **(SIZES | TOKENS | FAMILIES[name] | options))
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
            elif key.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    return model.eval()


def rows_of(lengths: Sequence[int] = (9, 16, 12, 7, 16), unlabelled: int = 3) -> list[dict[str, list[int]]]:
    """Random samples of some lengths; their first tokens are not predicted."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100] * unlabelled + row[unlabelled:]} for row in ids]


@dataclass(frozen=True)
class Banked:
    """A model, its bank and the samples that it is scored on."""

    model: PreTrainedModel
    subject: Subject
    groups: dict[str, tuple[str, ...]]

    @cached_property
    def starts(self) -> Starts:
        return self.subject.starts(self.model)

    def errors(self, group: str, bits: int) -> dict[str, torch.Tensor]:
        """What a trial's start differs from each weight of a group by."""
        return {
            path: self.starts.weight(group, bits, path, torch.device("cpu"))
            - self.model.get_submodule(path).weight.detach()
            for path in self.groups[group]
        }

    def samples(self, batch_size: int = 2) -> Samples:
        return self.subject.samples(batch_size)


def banked(
    folder: Path,
    name: str = "llama",
    group: str = "projection",
    init: str = "loftq",
    double_quant: bool = False,
    **options: Any,
) -> Banked:
    """Pack every group of a tiny decoder at 4 and 8 bits; the decoder is saved in `model` below the bank."""
    model = tiny(name, **options)
    model.save_pretrained(folder / "model")
    fill_bank(folder / "model", folder, double_quant, LORA.model_copy(update={"init": init}), "float32", group)
    subject = Subject(rows_of(), PAD, group, LEVELS, folder, LORA.alpha / LORA.rank)
    return Banked(model, subject, group_linears(model.config, group))
