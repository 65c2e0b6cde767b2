"""Name the stage, the cause and the remedy of what can go wrong while a stage works.

A full disk, no memory, a diverging loss or a broken file become a `StageError`; what was recorded before stays valid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpruner.errors import CorruptFile, QprunerError, StageError, StorageError, TrainingDiverged
from qpruner.models.memory import is_out_of_memory, shortage_text
from qpruner.pipeline.stage import Stage
from qpruner.runs.records import Results
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import display_name, storage_error


@contextmanager
def explained(stage: type[Stage[Any]], root: Path | None = None, repaired: Collection[str] = ()) -> Iterator[None]:
    """Turn what a stage may meet into a `StageError`.

    `root` is the run folder, and `repaired` names the stages whose damaged files the next command makes again.
    """
    try:
        yield
    except StageError:
        raise
    except TrainingDiverged as error:
        remedy = "the base model's weights are broken or too large for `model.dtype`: take another copy or dtype"
        if stage.trains:
            remedy = "lower `training.learning_rate`, or use bfloat16 or float32"
        raise StageError(stage.name, str(error), remedy) from error
    except CorruptFile as error:
        raise StageError(stage.name, str(error), _damage_remedy(error.path, root, repaired)) from error
    except StorageError as error:
        raise StageError(stage.name, error.cause, error.remedy) from error
    except QprunerError:
        raise
    except Exception as error:
        trouble = storage_error(error, root)
        cause = (trouble.cause, trouble.remedy) if trouble else _known_cause(stage, error)
        if cause is None:
            raise
        raise StageError(stage.name, *cause) from error


def _damage_remedy(path: Path | None, root: Path | None, repaired: Collection[str]) -> str:
    if path is None or root is None or not path.is_relative_to(root):
        return "fetch or write that file again, then repeat the command"
    parts = path.relative_to(root).parts
    if parts[0] == "trials":
        return "repeat the command: what is damaged is set aside, and a trial is run again with the plan that it had"
    if parts[0] in repaired:
        return "repeat the command: what is damaged is set aside, and that alone is made again"
    if parts[0] == "candidates":  # a row is a folder of its own
        doomed = root.joinpath(*parts[:2])
    elif parts[0] in Results.model_fields:  # a stage is there when its record is
        doomed = RunDir(root, create=False).record_path(parts[0])
    else:
        doomed = root / parts[0]
    return f"delete {display_name(doomed)}, then repeat the command: what it held is made again"


def _known_cause(stage: type[Stage[Any]], error: Exception) -> tuple[str, str] | None:
    """Cause and remedy of errors that libraries raise under types of their own."""
    if is_out_of_memory(error):
        return shortage_text(error), f"lower {stage.memory_keys}"
    if type(error).__name__ == "SafetensorError":
        # Of the run's own, and of this machine's copies, a command that begins finds what is damaged by itself.
        remedy = "repeat the command, which makes or fetches anew what is the run's; a model of yours has to be mended"
        return f"a safetensors file is damaged ({error})", remedy
    return None
