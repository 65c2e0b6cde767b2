"""Write the final model dense, with the adapter merged in: ``W + alpha / rank * B A`` in the model's own dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qpruner.export.peft import ADAPTER_FILES
from qpruner.models.checkpoint import dense_tensors, save_checkpoint
from qpruner.models.loading import OnLoading, checkpoint_config, load_tokenizer

PEFT_PREFIX = "base_model.model."
"""What peft puts before the name of a layer."""


def write_merged(final: Path, folder: Path, on_progress: OnLoading) -> None:
    """Unpack every layer, add its adapter and save the model."""
    import torch
    from safetensors.torch import load_file
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from qpruner.quantization.mixed import unpack

    config = checkpoint_config(final)
    dtype = config.dtype
    quantized = config.__dict__.pop("quantization_config", {"bits": {}})
    state = dense_tensors(final, lambda name: not name.startswith(PEFT_PREFIX))  # the adapter lies beside the weights
    for path in quantized["bits"]:
        names = [name for name in state if name.startswith(f"{path}.") and name != f"{path}.bias"]
        packed = {name.removeprefix(f"{path}."): state.pop(name) for name in names}
        state[f"{path}.weight"] = unpack(packed, torch.float32)
    settings = json.loads((final / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    adapter = load_file(final / ADAPTER_FILES[1])
    for done, (name, lora_a) in enumerate(adapter.items(), 1):
        if name.endswith(".lora_A.weight"):
            lora_b = adapter[name.replace(".lora_A.", ".lora_B.")]
            weight = name.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".")
            added = settings["lora_alpha"] / settings["r"] * (lora_b.float() @ lora_a.float())
            state[weight] = (state[weight].float() + added).to(dtype)
        on_progress("merging the adapter", done, len(adapter))
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    save_checkpoint(model, load_tokenizer(str(final)), folder, on_progress)
