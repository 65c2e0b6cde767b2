"""Keep `run.json`: where the latest command on a run folder stands, for other shells and machines.

It is no record: nothing is skipped because of it. A command that begins no stage leaves the file alone.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import psutil

from qpruner.cluster.slots import num_cores
from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile, QprunerError, StorageError, UserError, note_defect
from qpruner.runs import events
from qpruner.runs.records import RunState, StageState
from qpruner.runs.run_dir import LOG, RunDir
from qpruner.runs.storage import progress_seconds
from qpruner.runs.version import describe
from qpruner.wording import as_called

logger = logging.getLogger(__name__)
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "ray", "botorch", "hyperopt", "lm_eval")


class RunProgress:
    """Turns events into `run.json`: steps inside a stage now and then, the beginning and end of a stage always.

    It `is_written` once the file is this command's, and `has_begun` once a stage ran; recorded ones do not count.
    """

    def __init__(
        self, run: RunDir, config: RunConfig, until: str, command: str | None, holds_run: Callable[[], bool]
    ) -> None:
        now, before = time.time(), None
        with suppress(CorruptFile):
            before = run.read_state(RunState)
        self._run, self._holds_run, self._written = run, holds_run, 0.0
        self._earlier_stages = before.stages.keys() if before else set()
        self.is_written = self.has_begun = False
        self._state = RunState(
            config=config.model_dump(mode="json"),
            until=until,
            command=command or as_called(),
            folder=os.getcwd(),
            environment=_environment(),
            host=socket.gethostname(),
            pid=os.getpid(),
            started=now,
            updated=now,
            outcome="running",
            resumed=before.resumed + (before.outcome != "done") if before else 0,
        )

    def listen(self, event: events.Event) -> None:
        """Note one event."""
        match event:
            case events.StageStarted(stage, detail):
                self.is_written = self.has_begun = True
                self._set(stage, StageState(state="running", started=time.time(), text=detail))
            case events.StageFinished(stage, seconds, figures):
                self._update(stage, {"state": "done", "seconds": seconds, "text": figures})
            case events.StageSkipped(stage, figures, seconds):
                self._set(stage, StageState(state="recorded", started=time.time(), seconds=seconds, text=figures))
            case events.SearchPlanned(search):
                self._state = self._state.model_copy(update={"search": search})
            case events.SlotsFound(slots) if self._state.search:
                search = self._state.search.model_copy(update={"slots": slots})
                self._state = self._state.model_copy(update={"search": search})
            case events.Progress(stage, done, total, detail):
                self._update(stage, {"done": done, "total": total} | ({"text": detail} if detail else {}))
        is_small = isinstance(event, events.Progress | events.Message | events.TrialChanged | events.StepsSeen)
        begins_steps = isinstance(event, events.Progress) and event.done == 0
        if self.is_written and (
            not is_small or begins_steps or time.monotonic() - self._written >= progress_seconds(self._run.root)
        ):
            self._write()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Write how the command ends."""
        outcome, text, is_refused = "interrupted", None, False  # as by Ctrl-C
        try:
            yield
            outcome = "done"
        except QprunerError as error:
            outcome, text, is_refused = "failed", str(error), isinstance(error, UserError)
            raise
        except Exception as error:
            note = note_defect(error, f"{self._run.place.rstrip('/')}/{LOG}, which has all of it")
            outcome, text = "failed", f"{type(error).__name__}: {error}\n{note}"
            raise
        finally:
            # An earlier command's file may have stages that this one did not reach.
            has_all = self._earlier_stages <= self._state.stages.keys()
            self.is_written = self.has_begun or (has_all and not is_refused)
            if self.is_written:
                self._state = self._state.model_copy(update={"outcome": outcome, "error": text})
                self._write()

    def _set(self, stage: str, state: StageState) -> None:
        self._state = self._state.model_copy(update={"stages": {**self._state.stages, stage: state}})

    def _update(self, stage: str, update: dict[str, object]) -> None:
        if stage in self._state.stages:
            self._set(stage, self._state.stages[stage].model_copy(update=update))

    def _write(self) -> None:
        self._state = self._state.model_copy(update={"updated": time.time()})
        self._written = time.monotonic()
        if not self._holds_run():
            return
        try:
            self._run.write_state(self._state)
        except (OSError, StorageError) as error:
            # Where the disk is full the stage will say so, and better.
            logger.warning(
                "run.json could not be written: %s; until it can, `qpruner status` shows an earlier state", error
            )


def _environment() -> dict[str, str]:
    """List versions, and the hardware of the machine that the command was started on."""
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
    """Name the CPU as the kernel does; on ARM and on other systems as Python does."""
    with suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(\S.*?)\s*$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if names:
            return str(names[0])
    return platform.processor() or platform.machine()


def _gpus() -> str:
    """Describe each kind of GPU, as `2 x NVIDIA H100 80GB HBM3, 79.2 GiB`; `none` without any."""
    import torch

    seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter(f"{gpu.name}, {gpu.total_memory / 1024**3:.1f} GiB" for gpu in seen)
    return "; ".join(f"{number} x {kind}" for kind, number in kinds.items()) or "none"
