"""Break exports for vLLM."""

from collections.abc import Callable
from pathlib import Path

import torch
from made_tensors import token_rows
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qpruner.export.recode import recode
from qpruner.export.vllm.writing import dense_paths, vllm_format

ROWS = token_rows(2, 24)
DAMAGES = {
    "no adapter": "-?[0-9]% of its adapter's effect|diverge by",
    "a swapped head": "diverge by",
    "an unpermuted q": "diverge by|of its adapter's effect",
}
"""What is broken, and what the check says of it."""


def damaged(run: Path, folder: Path, damage: str) -> Path:
    """Damage an export; return a folder with the final model in its formats, to compare it with."""
    adapter = folder / "trained" / "adapter_model.safetensors"
    model = folder / "model.safetensors"
    if damage == "no adapter":
        change_weights(adapter, "lora_B", torch.Tensor.zero_)
    elif damage == "a swapped head":
        change_weights(model, "embed_tokens.weight", lambda weight: weight.roll(1, 0))
    else:
        change_weights(
            model, "layers.0.self_attn.q_proj.weight_packed", lambda q: q.roll(len(q) // 4, 0)
        )
    final = run / "final"
    recoded = folder.with_name("recoded")
    recode(final, recoded, vllm_format, False, fixed=dense_paths(AutoConfig.from_pretrained(final)))
    return recoded


def change_weights(file: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of a file that have this in their names."""
    weights = load_file(file)
    changed = {name: change(weights[name]).contiguous() for name in weights if part in name}
    assert changed
    save_file(weights | changed, file, {"format": "pt"})
