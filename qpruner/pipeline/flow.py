"""The flow: its stages, and the one loop that runs them.

Each stage leaves a record. A stage is skipped if the digest in its record equals the digest of its
current inputs, so `qpruner run` can be repeated after any crash. Subcommands, `status` and
estimates derive from `STAGES`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile, QprunerError, StageError, StorageError, TrainingDiverged
from qpruner.models.memory import is_out_of_memory, shortage_text
from qpruner.pipeline.bank import Bank
from qpruner.pipeline.comparison import Comparison
from qpruner.pipeline.context import Context
from qpruner.pipeline.evaluate import Evaluate
from qpruner.pipeline.finetune import Finetune
from qpruner.pipeline.pilot import Pilot
from qpruner.pipeline.prepare import Prepare
from qpruner.pipeline.prune import Prune
from qpruner.pipeline.report import Report
from qpruner.pipeline.search import Search
from qpruner.pipeline.sensitivity import Sensitivity
from qpruner.pipeline.serve import Serve
from qpruner.pipeline.stage import Stage
from qpruner.runs.events import StageFinished, StageSkipped, StageStarted
from qpruner.runs.records import Results
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import display_name, exists, storage_error

Stages = tuple[type[Stage[Any]], ...]
STAGES: Stages = (
    Prepare,
    Prune,
    Bank,
    Sensitivity,
    Pilot,
    Search,
    Finetune,
    Evaluate,
    Comparison,
    Serve,
    Report,
)


def names_of(stages: Stages) -> tuple[str, ...]:
    """List the names of stages."""
    return tuple(stage.name for stage in stages)


def stages_until(until: str) -> Stages:
    """List the stages up to and including `until`."""
    return STAGES[: names_of(STAGES).index(until) + 1]


def wanted_stages(config: RunConfig, until: str = "report") -> Stages:
    """List the stages up to `until` that the configuration asks for."""
    return tuple(stage for stage in stages_until(until) if stage.is_wanted(config))


def run_flow(context: Context, until: str) -> Results:
    """Run the stages that the configuration asks for, up to `until`, and return their records."""
    for kind in wanted_stages(context.config, until):
        run_stage(kind(context))
    return context.records


def run_stage(stage: Stage[Any]) -> None:
    """Run one stage unless its record is valid, and add the record to the context.

    The stage writes into a scratch folder, which replaces the folder of the stage before the record
    is written.
    """
    context = stage.context
    run = context.run_dir
    stage.begin()
    digest = stage.digest if stage.record else ""
    try:
        record = stage.matching_record(digest)
    except CorruptFile as error:
        stage.notify(f"{error}; the stage runs again")
        record = None
    if record and stage.is_complete(run.stage(stage.name)):
        context.add_record(stage.name, record)
        context.emit(StageSkipped(stage.name, stage.summary(record), record.seconds))
        return
    context.emit(StageStarted(stage.name, stage.detail()))
    started = time.monotonic()
    held = context.machines.gpu_time.seconds
    with explained(type(stage), run.root):
        if stage.record is None:
            stage.run(run.root)
        else:
            context.check_lock(stage.name)
            scratch = run.begin(stage.name)
            fields = stage.run(scratch)
            fields = {"gpu_seconds": context.machines.gpu_time.seconds - held} | fields
            record = stage.record(digest=digest, seconds=time.monotonic() - started, **fields)
            context.check_lock(stage.name)
            run.commit(stage.name, scratch, record, stage.keeps_files)
            context.add_record(stage.name, record)
    seconds = record.seconds if record else time.monotonic() - started
    context.emit(StageFinished(stage.name, seconds, stage.summary(record)))


def recorded(context: Context) -> None:
    """Add to the context the records that `run` would reuse.

    The files of the stages are not checked.
    """
    context.records = Results()
    for kind in wanted_stages(context.config):
        if kind.record is None:
            continue
        stage = kind(context)
        record = None
        with suppress(CorruptFile):
            # computing the digest of the inputs takes time
            if exists(context.run_dir.record_path(stage.name)):
                record = stage.matching_record(stage.digest)
        if record is None:
            return
        context.add_record(kind.name, record)


@contextmanager
def explained(stage: type[Stage[Any]], root: Path | None = None) -> Iterator[None]:
    """Turn known errors of a stage into a `StageError` that names stage, cause and remedy.

    Args:
        stage: The class of the stage.
        root: The run folder, if there is one.
    """
    try:
        yield
    except StageError:
        raise
    except TrainingDiverged as error:
        remedy = (
            "the weights of the base model are broken or too large for `model.dtype`: use another "
            "copy or dtype"
        )
        if stage.trains:
            remedy = "lower `training.learning_rate`, or use bfloat16 or float32"
        raise StageError(stage.name, str(error), remedy) from error
    except CorruptFile as error:
        raise StageError(stage.name, str(error), _damage_remedy(error.path, root)) from error
    except StorageError as error:
        raise StageError(stage.name, error.cause, error.remedy) from error
    except QprunerError:
        raise
    except Exception as error:
        trouble = storage_error(error, root)
        if trouble:
            raise StageError(stage.name, trouble.cause, trouble.remedy) from error
        if is_out_of_memory(error):
            raise StageError(
                stage.name, shortage_text(error), f"lower {stage.memory_keys}"
            ) from error
        if type(error).__name__ != "SafetensorError":
            raise
        remedy = (
            "repeat the command, which replaces damaged files of the run; if your own model is "
            "damaged, replace it"
        )
        raise StageError(stage.name, f"a safetensors file is damaged ({error})", remedy) from error


def _damage_remedy(path: Path | None, root: Path | None) -> str:
    """Say how to replace a damaged file.

    The run repairs some files itself; others must be deleted first.
    """
    if path is None or root is None or not path.is_relative_to(root):
        return "fetch or write that file again, then repeat the command"
    parts = path.relative_to(root).parts
    if parts[0] in ("trials", "cuts", "banks", "sensitivities", Prepare.name):
        return "repeat the command: the damaged file is set aside, and only that file is made again"
    # each candidate has its own folder
    doomed = root.joinpath(*parts[: 2 if parts[0] == "candidates" else 1])
    if parts[0] in Results.model_fields:  # without its record the stage runs again
        doomed = RunDir(root, create=False).record_path(parts[0])
    return f"delete {display_name(doomed)}, then repeat the command: its contents are made again"
