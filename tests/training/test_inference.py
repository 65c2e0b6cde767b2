"""What a generation takes, where a model's weights are mapped from their file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qpruner.quantization.assembly import measured_bytes
from qpruner.training.inference import take_turn


def test_mapped_weights_are_counted_once(tmp_path: Path) -> None:
    """A generation is what reads them first; they are among the model's own bytes already."""
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    weights = measured_bytes(model)
    assert weights > 50e6, "of which the generation's own part is little"
    turn = take_turn(model, list(range(32)), 4)
    assert weights <= turn.memory_bytes < 1.5 * weights
    assert turn.memory_counter == "tensors of the model, and rise of resident memory"
