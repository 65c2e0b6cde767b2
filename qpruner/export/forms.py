"""Export the final model in forms that other tools can load.

An export is written to a hidden folder, loaded again and compared with the final model; only then is it renamed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qpruner.data.encoding import load_encoded
from qpruner.errors import UserError
from qpruner.export.compare import Likeness, compare
from qpruner.export.recode import ADAPTER_FILES, dense, recode
from qpruner.hf import PEFT_BASE
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress, load_tokenizer
from qpruner.models.memory import raising_out_of_memory
from qpruner.runs.records import MARK, ExportRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import exists, fetch, retry_storage, storage_at, write_json

Form = Literal["merged", "peft"]
AGAINST_SHORTAGE = (
    "end other programs, or repeat the command on a machine with more memory; if a GPU ran out of memory, set "
    "`CUDA_VISIBLE_DEVICES=` to use the CPU"
)
NUM_ROWS = 8
"""Number of rows of `data.confirmation` on which predictions are compared."""


@dataclass(frozen=True)
class Exported(Likeness):
    """A finished export: `is_plain` is True if transformers can load it without `import qpruner.hf`."""

    folder: Path
    is_plain: bool


@raising_out_of_memory(AGAINST_SHORTAGE)
def export(run: RunDir, form: Form, target: Path, on_progress: OnWork = ignore_progress) -> Exported:
    """Export the final model of a run to a new folder.

    The form `merged` has dense weights with the adapter merged in; `peft` has the adapter, and the quantized model in a
    subfolder. Raise `StageError` if the export and the final model differ.
    """
    final = run.root / "final"
    if not exists(final / ADAPTER_FILES[0]):
        raise UserError(f"{run.place} has no final model: repeat `qpruner run` to finish the run")
    if target.exists():
        raise UserError(f"{target} exists: delete this folder or name another with `--out`")
    record = ExportRecord(final=run.final_digests())
    final = fetch(final)
    scratch = target.with_name(f".{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if form == "merged":
            recode(final, scratch, dense, True, on_progress)
        else:
            _write_peft(final, scratch, target)
        rows = load_encoded(run.stage("prepare") / "data" / "confirmation")[:NUM_ROWS]
        likeness = compare(final, scratch, [row["input_ids"] for row in rows], on_progress)
        write_json(scratch / MARK, record)
        storage_at(target).publish(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    is_plain = form == "merged" and not checkpoint_config(target).is_heterogeneous
    return Exported(**vars(likeness), folder=target, is_plain=is_plain)


def _write_peft(final: Path, folder: Path, target: Path) -> None:
    """Write the adapter and, in a subfolder, its quantized base; name the base by its later path in `target`."""
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
