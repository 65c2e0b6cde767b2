"""Write the final model as `PeftModel.from_pretrained` loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qpruner.hf import PEFT_BASE
from qpruner.models.loading import load_tokenizer
from qpruner.runs.storage import retry_storage

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_peft(final: Path, folder: Path, target: Path) -> None:
    """Write the adapter, and the quantized model in a folder below it, for a folder that becomes `target`."""
    left_out = shutil.ignore_patterns(*ADAPTER_FILES, "README.md")
    settings = json.loads((final / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str((target / PEFT_BASE).resolve())
    tokenizer = load_tokenizer(str(final))

    def write() -> None:
        shutil.copytree(final, folder / PEFT_BASE, ignore=left_out, dirs_exist_ok=True)
        (folder / ADAPTER_FILES[0]).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        shutil.copy2(final / ADAPTER_FILES[1], folder)
        tokenizer.save_pretrained(folder)

    retry_storage(write, target)
