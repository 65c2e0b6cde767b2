"""Let plain transformers load the models that qpruner writes: import this module once.

`AutoModelForCausalLM.from_pretrained(folder)` then loads pruned and final models, with the adapter
if there is one. On a CPU without bfloat16 instructions, matrix products are computed in float32.
"""

from pathlib import Path
from typing import Any

from qpruner.models import cpu, ragged
from qpruner.models.loading import OnWork, device, ignore_progress, reporting_tensors
from qpruner.quantization import mixed

__all__ = ["load", "mixed", "ragged", "weights_folder"]

PEFT_BASE = "base"  # folder of the quantized model inside a peft export

ragged.install()
cpu.install()


def weights_folder(folder: Path) -> Path:
    """Return the folder with the weights of a model.

    It is the subfolder `base` of a peft export, or else the folder itself.
    """
    base = folder / PEFT_BASE
    return base if base.is_dir() and not (folder / "config.json").exists() else folder


def load(folder: Path, on_progress: OnWork = ignore_progress) -> Any:
    """Load a final model, an export or any other transformers model onto the best device.

    No tokenizer is loaded.
    """
    from transformers import AutoModelForCausalLM

    weights = weights_folder(folder)
    with reporting_tensors(on_progress):
        model = AutoModelForCausalLM.from_pretrained(weights, use_safetensors=True).to(device())
    if weights != folder:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model
