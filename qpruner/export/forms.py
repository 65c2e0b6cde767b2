"""Write the final model in forms that other tools load.

An export is written aside, loaded again and compared with the final model before it gets its name.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qpruner.data.encoding import load_encoded
from qpruner.errors import UserError
from qpruner.export.compare import Likeness, compare
from qpruner.export.merged import write_merged
from qpruner.export.peft import ADAPTER_FILES, write_peft
from qpruner.models.loading import OnLoading, checkpoint_config, ignore_progress
from qpruner.models.memory import raising_out_of_memory
from qpruner.runs.records import MARK, ExportRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import exists, fetch, storage_at, write_json

Form = Literal["merged", "peft"]
AGAINST_SHORTAGE = (
    "end what else takes memory, or repeat the command on a machine that has more; where a GPU's memory ran out, set "
    "`CUDA_VISIBLE_DEVICES=` to use the machine's"
)
NUM_ROWS = 8
"""Confirmation rows whose predictions are compared."""


@dataclass(frozen=True)
class Exported(Likeness):
    """A written export: its folder, and whether it loads without `import qpruner.hf`."""

    folder: Path
    is_plain: bool


@raising_out_of_memory(AGAINST_SHORTAGE)
def export(run: RunDir, form: Form, target: Path, on_progress: OnLoading = ignore_progress) -> Exported:
    """Write the final model in another form.

    Args:
        run: A run with a final model.
        form: `merged`: dense weights with the adapter added in; `peft`: the adapter, and the quantized model below it.
        target: A folder that does not exist yet.
        on_progress: Called with what is done, how far, and of how many.

    Raises:
        UserError: If there is no final model, or the target exists.
        StageError: If the export does not predict what the final model does.
        CorruptFile: If a weight file cannot be read.
        StorageError: If the disk has no room for it.
        OutOfMemory: If memory runs out.
    """
    final = run.root / "final"
    if not exists(final / ADAPTER_FILES[0]):
        raise UserError(f"{run.place} has no final model: repeat `qpruner run` until it has fine-tuned one")
    if target.exists():
        raise UserError(f"{target} exists: delete it or name another folder with `--out`")
    record = ExportRecord(final=run.final_digests())
    final = fetch(final)
    scratch = target.with_name(f".{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if form == "merged":
            write_merged(final, scratch, on_progress)
        else:
            write_peft(final, scratch, target)
        rows = load_encoded(run.stage("prepare") / "data" / "confirmation")[:NUM_ROWS]
        likeness = compare(final, scratch, [row["input_ids"] for row in rows], on_progress)
        write_json(scratch / MARK, record)
        storage_at(target).publish(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    is_plain = form == "merged" and not checkpoint_config(target).is_heterogeneous
    return Exported(**vars(likeness), folder=target, is_plain=is_plain)
