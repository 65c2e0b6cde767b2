"""Break exports for vLLM."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qpruner.export.recode import recode
from qpruner.export.vllm.writing import dense_paths, vllm_format

ROWS = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(1)).tolist()
DAMAGES = {
    "no adapter": "-?[0-9]% of its adapter's effect|diverge by",
    "a swapped head": "diverge by",
    "an unpermuted q": "diverge by|of its adapter's effect",
}
"""What is broken, and what the check says of it."""


def damaged(run: Path, folder: Path, damage: str) -> Path:
    if damage == "no adapter":
        file = folder / "adapter" / "adapter_model.safetensors"
        save_file(
            {
                name: each.zero_() if "lora_B" in name else each
                for name, each in load_file(file).items()
            },
            file,
        )
    elif damage == "a swapped head":
        _roll(folder, "model.embed_tokens.weight", lambda each: 1)
    else:
        _roll(folder, "model.layers.0.self_attn.q_proj.weight_packed", lambda each: len(each) // 4)
    recoded = folder.with_name("recoded")
    recode(
        run / "final",
        recoded,
        vllm_format,
        False,
        fixed=dense_paths(AutoConfig.from_pretrained(run / "final")),
    )
    return recoded


def _roll(folder: Path, name: str, rows: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].roll(rows(weights[name]), 0).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
