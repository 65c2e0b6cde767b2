"""Run a command.

Check the configuration, hold the lock of the run folder, keep `run.json`, and run the flow.
"""

import contextlib
import logging
import os
import platform
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import starmap
from pathlib import Path
from typing import Any

import psutil

from qpruner.cluster.slots import assumed_slots, num_cores
from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile, QprunerError, StorageError, UserError, note_defect
from qpruner.models.memory import freeze_libraries
from qpruner.pipeline.bank import Bank
from qpruner.pipeline.context import Context
from qpruner.pipeline.flow import STAGES, names_of, recorded, run_flow, stages_until, wanted_stages
from qpruner.pipeline.nodes import look_at_nodes
from qpruner.pipeline.preflight import Inspection, amount, inspect
from qpruner.pipeline.report import Report, report_unfinished
from qpruner.pipeline.serve import Serve
from qpruner.pipeline.shapes import left_out_text
from qpruner.pipeline.stage import Stage
from qpruner.runs import events
from qpruner.runs.events import COMMAND, Emit, Event, Message
from qpruner.runs.lock import hold_run
from qpruner.runs.logs import Uploader
from qpruner.runs.records import Results, RunState, StageState
from qpruner.runs.run_dir import LOG, RunDir
from qpruner.runs.storage import CACHE, exists, progress_seconds
from qpruner.runs.version import describe
from qpruner.search.progress import event_line
from qpruner.wording import as_called

logger = logging.getLogger(__name__)
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "ray",
    "botorch",
    "hyperopt",
    "lm_eval",
)
SMALL_FILES = 2**20  # bytes that every command needs for records, log and report


@dataclass(frozen=True)
class Checked:
    """What a run would do, as `check` found it."""

    inspection: Inspection  # of the recorded cuts, if the model was pruned
    slots: int  # trials or fine-tunes that run at once
    resources: dict[str, float]  # of one trial
    disk: tuple[int, int]  # needed bytes at most, and free bytes


def check(
    config: RunConfig, emit: Emit, address: str | None = None, gpu_is_elsewhere: bool = False
) -> Checked:
    """Raise the errors that `run` would raise before its first stage; return what `run` would do.

    Without an `address` the run is planned for this machine. With `gpu_is_elsewhere` it is planned
    for a machine with the GPUs that a trial asks for.
    """
    inspection = inspect(config, works_here=not (address or gpu_is_elsewhere))
    run_dir = RunDir(config.output, create=False)
    assumed = None
    if gpu_is_elsewhere:
        requested = config.search.resources_per_trial
        assumed = assumed_slots(requested.model_dump() if requested else None)
    context = Context(config, run_dir, emit, address, inspection, assumed)
    with contextlib.closing(context):
        disk = _check_room(context)
        for stage in STAGES:
            stage(context).check()
        if address:
            look_at_nodes(context)
        recorded(context)
        shapes = inspection.shapes
        if context.records.prune:
            shapes = context.shapes
            shapes.check_budget()
        warnings = [*inspection.warnings, *starmap(left_out_text, shapes.left_out.items())]
        warnings += Serve(context).warnings()
        machines = context.machines
        slots = machines.known_slots.concurrent(
            machines.trial_resources, config.search.max_concurrent
        )
        return Checked(
            Inspection(shapes, inspection.rows, tuple(warnings)),
            slots=slots,
            resources=machines.trial_resources,
            disk=disk,
        )


def run(
    config: RunConfig,
    emit: Emit,
    address: str | None = None,
    until: str = Report.name,
    command: str | None = None,
) -> Results:
    """Run the flow up to the stage `until`, skip recorded stages, and return all records.

    Without an `address` Ray starts on this machine when a stage needs Ray. `command` is the command
    line to show users.
    """
    from qpruner.search.tensorboard import FOLDER, Board  # loads torch

    stages = stages_until(until)
    inspection = inspect(config, works_here=address is None, packs=Bank in stages)
    planned = Context(config, RunDir(config.output, create=False), emit, address, inspection)
    with contextlib.closing(planned):
        _check_room(planned)
    run_dir = RunDir(config.output)
    with (
        hold_run(run_dir.root, lambda text: emit(Message(COMMAND, text))) as holds_run,
        contextlib.closing(Uploader(run_dir.root, FOLDER, LOG)) as uploader,
    ):
        _ = run_dir.id  # creates the id: if the id exists, a missing lock counts as taken over
        progress = RunProgress(run_dir, config, until, command, holds_run)
        board = Board(run_dir.root, config)

        def on_event(event: Event) -> None:
            line = event_line(event, config.search.steps)
            if line:
                logger.info(line)
            for listen in (progress.listen, board.listen, uploader.listen, emit):
                listen(event)

        context = Context(config, run_dir, on_event, address, inspection, holds_run=holds_run)
        unfreeze = freeze_libraries()
        try:
            with progress.ending(), contextlib.closing(context):
                _warn_and_check(context, stages)
                results = run_flow(context, until)
        except BaseException as error:
            # A report would wait again for a storage that does not answer.
            is_away = isinstance(error, StorageError) or isinstance(error.__cause__, StorageError)
            # else keep the report of an earlier command
            if progress.has_begun and not is_away and holds_run():
                report_unfinished(run_dir)
            raise
        finally:
            unfreeze()
        # If no stage ran, an earlier report may be more complete.
        if (
            until != Report.name
            and holds_run()
            and (progress.has_begun or not exists(run_dir.root / "report.html"))
        ):
            on_event(Message(Report.name, report_unfinished(run_dir)))
        return results


def _check_room(context: Context) -> tuple[int, int]:
    """Raise an error if the disk is too small for the run.

    Return the bytes needed at most, and the free bytes.
    """
    run = context.run_dir
    existing = next(parent for parent in (run.root, *run.root.parents) if parent.exists())
    wanted = [stage(context) for stage in wanted_stages(context.config) if stage.record]
    free = shutil.disk_usage(existing).free
    needed = SMALL_FILES + sum(stage.disk_bytes() for stage in wanted)
    if free < needed:  # subtract existing files, which takes time to find
        recorded(context)
        needed = SMALL_FILES + sum(
            max(0, stage.disk_bytes() - stage.disk_used()) for stage in wanted
        )
    if free < needed:
        other = "" if run.storage.fills_this_disk else f" by {CACHE}"
        raise UserError(
            f"`output`: the run needs about {amount(needed)} more in {existing}, where "
            f"{amount(free)} are free: make room or name another folder{other}"
        )
    return needed, free


def _warn_and_check(context: Context, stages: Sequence[type[Stage[Any]]]) -> None:
    """Emit the warnings of the configuration and the stages.

    Then raise the errors of stages and nodes.
    """
    for warning in context.config.warnings:
        context.emit(Message(COMMAND, f"warning: {warning}"))
    for stage in stages:
        for warning in stage(context).warnings():
            context.emit(Message(stage.name, f"warning: {warning}"))
    for stage in stages:
        stage(context).check()
    if context.address:
        look_at_nodes(context)


class RunProgress:
    """Writes the state of the latest command to `run.json`.

    `status` reads it in other shells and on other machines.

    Steps inside a stage are written at intervals. `has_begun` is True once a stage has started; a
    command that starts no stage keeps the file of an earlier command.
    """

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        until: str,
        command: str | None,
        holds_run: Callable[[], bool],
    ) -> None:
        now = time.time()
        num_resumed = 0
        with contextlib.suppress(CorruptFile):
            before = run.read_state(RunState)
            if before:
                num_resumed = before.resumed + (before.outcome != "done")
        self._run = run
        self._holds_run = holds_run
        self._written = 0.0
        self.has_begun = False
        self._state = RunState(
            config=config.model_dump(mode="json"),
            flow=names_of(wanted_stages(config)),
            asked=names_of(wanted_stages(config, until)),
            until=until,
            command=command or as_called(),
            folder=os.getcwd(),
            environment=_environment(),
            host=socket.gethostname(),
            pid=os.getpid(),
            started=now,
            updated=now,
            outcome="running",
            resumed=num_resumed,
        )

    def listen(self, event: events.Event) -> None:
        """Update the state by an event, and write the file."""
        match event:
            case events.StageStarted(stage, detail):
                self.has_begun = True
                self._set(stage, StageState(state="running", started=time.time(), text=detail))
            case events.StageFinished(stage, seconds, figures):
                self._update(stage, {"state": "done", "seconds": seconds, "text": figures})
            case events.StageSkipped(stage, figures, seconds):
                self._set(
                    stage,
                    StageState(
                        state="recorded", started=time.time(), seconds=seconds, text=figures
                    ),
                )
            case events.SearchPlanned(search):
                self._change(search=search)
            case events.SlotsFound(slots) if self._state.search:
                self._change(search=self._state.search.model_copy(update={"slots": slots}))
            case events.Progress(stage, done, total, detail):
                update: dict[str, object] = {"done": done, "total": total}
                if detail:
                    update["text"] = detail
                self._update(stage, update)
        is_small = isinstance(
            event, events.Progress | events.Message | events.TrialChanged | events.StepsSeen
        )
        begins_steps = isinstance(event, events.Progress) and event.done == 0
        if self.has_begun and (
            not is_small
            or begins_steps
            or time.monotonic() - self._written >= progress_seconds(self._run.root)
        ):
            self._write()

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Write to `run.json` how the command in the `with` block ended."""
        outcome = "interrupted"  # by Ctrl-C, for example
        text = None
        try:
            yield
            outcome = "done"
        except QprunerError as error:
            outcome = "failed"
            text = str(error)
            raise
        except Exception as error:
            note = note_defect(
                error, f"{self._run.place.rstrip('/')}/{LOG}, which has the whole traceback"
            )
            outcome = "failed"
            text = f"{type(error).__name__}: {error}\n{note}"
            raise
        finally:
            if self.has_begun:
                self._change(outcome=outcome, error=text)
                self._write()

    def _change(self, **fields: object) -> None:
        self._state = self._state.model_copy(update=fields)

    def _set(self, stage: str, state: StageState) -> None:
        self._change(stages={**self._state.stages, stage: state})

    def _update(self, stage: str, update: dict[str, object]) -> None:
        if stage in self._state.stages:
            self._set(stage, self._state.stages[stage].model_copy(update=update))

    def _write(self) -> None:
        self._change(updated=time.time())
        self._written = time.monotonic()
        if not self._holds_run():
            return
        try:
            self._run.write_state(self._state)
        except (OSError, StorageError) as error:
            # If the disk is full, the stage itself raises a better error.
            logger.warning(
                "run.json could not be written: %s; "
                "`qpruner status` shows an older state until it can",
                error,
            )


def _environment() -> dict[str, str]:
    """Return the versions of packages and the hardware of this machine."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(Path("/proc/cpuinfo")),
        "cpu cores": str(num_cores()),
        "memory": f"{psutil.virtual_memory().total / 1024**3:.1f} GiB",
        "gpus": _gpus(),
        "qpruner": describe(),
        **{name: version(name) for name in PACKAGES},
    }


def _cpu_model(cpuinfo: Path) -> str:
    """Return the CPU name from the kernel, or from Python on ARM and other systems."""
    with contextlib.suppress(OSError):
        text = cpuinfo.read_text(errors="replace")
        name = re.search(r"^model name\s*:\s*(\S.*?)\s*$", text, re.MULTILINE)
        if name:
            return name[1]
    return platform.processor() or platform.machine()


def _gpus() -> str:
    """Describe the GPUs by kind, or return `none`.

    An example is `2 x NVIDIA H100 80GB HBM3, 79.2 GiB`.
    """
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter(f"{gpu.name}, {gpu.total_memory / 1024**3:.1f} GiB" for gpu in gpus)
    return "; ".join(f"{number} x {kind}" for kind, number in kinds.items()) or "none"
