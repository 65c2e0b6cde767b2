"""How a stage runs: skipped when its record has the digest it would have now, else run, committed and recorded.

What can go wrong while a stage works (a full disk, no memory, a diverging loss, a broken file) becomes a `StageError`
that names the stage, the cause and the remedy; what was recorded before it stays valid.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qpruner.errors import CorruptFile, QprunerError, StageError, StorageError, TrainingDiverged
from qpruner.models.memory import is_out_of_memory, told_shortage
from qpruner.pipeline.context import Context
from qpruner.runs.events import Emit, Message, StageFinished, StageSkipped, StageStarted
from qpruner.runs.records import STAGES, Record, digest_of
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import FILES, display_name, files_in, quarantine, storage_error, verify_folder

RecordType = TypeVar("RecordType", bound=Record)

LOOKED_THROUGH = ("prepare", "prune", "bank")
"""Stages whose files a command that begins compares with their lists."""

ROWS_AT_ONCE = {
    "prune": "`calibration.batch_size` or `calibration.max_length`",
    "sensitivity": "`sensitivity.batch_size` or `data.max_length`",
    "evaluate": "`evaluate.batch_size` or `data.max_length`",
}
"""What sets the memory of the stages that train nothing: rows of a pass, and how long they are."""


@dataclass(frozen=True)
class Stage:
    """One stage of the flow.

    Attributes:
        name: Its folder and record.
        detail: What it is about to do, for the line that starts it.
        inputs: Everything its result depends on.
        resumes: Whether it uses what a killed command left in its scratch folder.
    """

    name: str
    detail: str
    inputs: tuple[Any, ...]
    resumes: bool = False

    @property
    def digest(self) -> str:
        return digest_of(self.name, *self.inputs)


def run_stage(
    context: Context,
    stage: Stage,
    kind: type[RecordType],
    work: Callable[[Path], dict[str, Any]],
    figures: Callable[[RecordType], str],
) -> RecordType:
    """Run a stage unless it is recorded.

    Args:
        context: The run; told of start, skip and end. A stage that counts its own GPU time says so in its fields.
        stage: What to run.
        kind: Class of its record.
        work: Writes the stage's files into a scratch folder and returns the record's fields.
        figures: The record as one line.

    Raises:
        StageError: If the stage cannot go on.
    """
    run, emit, gpu_time = context.run_dir, context.emit, context.gpu_time
    record = _recorded(run, stage, kind, emit)
    if record is not None:
        emit(StageSkipped(stage.name, figures(record), record.seconds))
        return record
    emit(StageStarted(stage.name, stage.detail))
    started, held = time.monotonic(), gpu_time.seconds
    with explained(stage.name, run.root):
        context.check_ours(stage.name)
        scratch = run.begin(stage.name, stage.resumes)
        fields = work(scratch)
        own = {"gpu_seconds": gpu_time.seconds - held} | fields
        record = kind(digest=stage.digest, seconds=time.monotonic() - started, **own)
        context.check_ours(stage.name)
        run.commit(stage.name, scratch, record)
    emit(StageFinished(stage.name, record.seconds, figures(record)))
    return record


def _recorded(run: RunDir, stage: Stage, kind: type[RecordType], emit: Emit) -> RecordType | None:
    try:
        record = matching(run, stage, kind)
    except CorruptFile as error:
        emit(Message(stage.name, f"{error}; the stage is run again"))
        return None
    return record if record and is_whole(run, run.stage(stage.name), stage.name, emit) else None


def matching(run: RunDir, stage: Stage, kind: type[RecordType]) -> RecordType | None:
    """The record that a stage need not run for: it has the digest that it would have now, and its folder is there.

    Raises:
        CorruptFile: If the record cannot be read.
    """
    record = run.read_record(stage.name, kind)
    if record is None or record.digest != stage.digest or not run.has_folder(stage.name):
        return None
    return record


def is_whole(run: RunDir, folder: Path, stage: str, emit: Emit) -> bool:
    """Whether a folder of a recorded stage and those in it are as their lists say, if they have one; the first that is
    damaged is set aside."""
    inner = [folder / name.removesuffix(FILES) for name in files_in(folder) if name.endswith(FILES)]
    for part in (folder, *inner):
        try:
            verify_folder(part)
        except CorruptFile as error:
            where = f"set aside in {quarantine(part, run.root)}, " if files_in(part) else ""
            emit(Message(stage, f"warning: {error}; {where}the stage is run again"))
            return False
    return True


@contextmanager
def explained(stage: str, root: Path | None = None) -> Iterator[None]:
    """Turn what a stage may meet into a `StageError`.

    Args:
        stage: Its name.
        root: The run folder, to tell its own files from the user's.
    """
    try:
        yield
    except StageError:
        raise
    except TrainingDiverged as error:
        raise StageError(stage, str(error), _against_nan(stage)) from error
    except CorruptFile as error:
        raise StageError(stage, str(error), _mend(error.path, root)) from error
    except StorageError as error:
        raise StageError(stage, error.cause, error.remedy) from error
    except QprunerError:
        raise
    except Exception as error:
        trouble = storage_error(error, root)
        cause = (trouble.cause, trouble.remedy) if trouble else _known_cause(stage, error)
        if cause is None:
            raise
        raise StageError(stage, *cause) from error


def _against_nan(stage: str) -> str:
    """What to do about NaN; before anything is trained it comes with the weights."""
    if stage in ("search", "finetune", "comparison"):
        return "lower `training.learning_rate`, or use bfloat16 or float32"
    return "the base model's weights are broken or too large for `model.dtype`: take another copy or dtype"


def _mend(path: Path | None, root: Path | None) -> str:
    """What to do about a file that cannot be read: a stage whose folder is gone is run again, and a search that begins
    sets aside what it keeps of its trials."""
    if path is None or root is None or not path.is_relative_to(root):
        return "fetch or write that file again, then repeat the command"
    parts = path.relative_to(root).parts
    if parts[0] == "trials":
        return "repeat the command: what is damaged is set aside, and a trial is run again with the plan that it had"
    if parts[0] in LOOKED_THROUGH:
        return "repeat the command: what is damaged is set aside, and that alone is made again"
    if parts[0] == "candidates":  # a row is a folder of its own
        doomed = root.joinpath(*parts[:2])
    elif parts[0] in STAGES:  # a stage is there when its record is
        doomed = root / "records" / f"{parts[0]}.json"
    else:
        doomed = root / parts[0]
    return f"delete {display_name(doomed)}, then repeat the command: what it held is made again"


def _against_shortage(stage: str) -> str:
    """What to do about memory that is too small, which depends on what the stage holds most of."""
    if stage in ROWS_AT_ONCE:
        return f"lower {ROWS_AT_ONCE[stage]}"
    return "lower `training.micro_batch_size` or `data.max_length`, or set `training.gradient_checkpointing`"


def _known_cause(stage: str, error: Exception) -> tuple[str, str] | None:
    """Cause and remedy of errors that libraries raise under types of their own."""
    if is_out_of_memory(error):
        return told_shortage(error), _against_shortage(stage)
    if type(error).__name__ == "SafetensorError":
        # Of the run's own, and of this machine's copies, a command that begins finds what is damaged by itself.
        remedy = "repeat the command, which makes or fetches anew what is the run's; a model of yours has to be mended"
        return f"a safetensors file is damaged ({error})", remedy
    return None
