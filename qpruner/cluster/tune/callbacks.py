"""What hooks into Ray Tune beside searcher and scheduler: halts a search, kills trials that hang."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.callback import Callback
from ray.tune.experiment import Trial
from ray.tune.stopper import Stopper

from qpruner.cluster.ray_private import RayActorManager
from qpruner.cluster.tune.job import LivesInDriver, SearchJob
from qpruner.errors import NodeDiffers, QprunerError
from qpruner.runs.events import Emit, Message, StepsSeen
from qpruner.runs.storage import for_each, write_progress
from qpruner.search.trial_records import read_pulse
from qpruner.wording import counted

KILLED_FOR_MEMORY = "Ray killed this worker because its machine ran out of memory"


class ActorManager(RayActorManager):  # type: ignore[misc]
    """Makes a worker that Ray killed for memory fail its trial alone; Ray (2.60) would end every trial's session."""

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"{KILLED_FOR_MEMORY}: {exception}")
        super()._actor_task_failed(tracked_actor_task, exception)


class Halt(LivesInDriver, Stopper, Callback):  # type: ignore[misc]
    """Ends Tune's session between rungs, on Ctrl-C or on request; a second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self, emit: Emit) -> None:
        self.requested = False  # the search is to end
        self.interrupted = False  # by a person
        self.trouble: QprunerError | None = None  # that the search ends with; None if it may be resumed
        self._emit, self._announced, self._num_running, self._at_once = emit, False, 0, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C inside; signals reach the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether a trial that reported a rung is to stop there."""
        return self.requested

    def on_error_text(self, error: str) -> None:
        """End the search if a trial's error is of a node that cannot be used: the next trials would fail there too."""
        found = re.search(rf"^RuntimeError: {NodeDiffers.__name__}: (.+)$", error, re.MULTILINE)
        if found and self.trouble is None:
            self.end(NodeDiffers(found[1]))
            self._emit(Message("search", f"warning: {found[1]}; running rungs finish, nothing new starts"))

    def end(self, trouble: QprunerError, at_once: bool = False) -> None:
        """End the search with an error, the first there is: between rungs, or at Tune's next step.

        Raised while Tune handles a result, it would come out as a TuneError, after Tune had told the searcher a second
        time that its trial is over (Ray 2.60).
        """
        self.requested, self.trouble = True, self.trouble or trouble
        self._at_once = self._at_once or at_once

    def stop_all(self) -> bool:
        """Return whether no trial is running; those that wait for a slot are not started any more."""
        return self.requested and not self._num_running

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raise the error that ends the search at once; announce an interruption."""
        if self.trouble and self._at_once:
            raise self.trouble
        self._num_running = sum(1 for trial in trials if trial.status == Trial.RUNNING)
        if self.interrupted and not self._announced:
            # Not in the signal's handler, which may come in the middle of a line.
            self._announced = True
            awaited = counted(self._num_running, "running rung")
            text = f"interrupted: waiting for {awaited} to finish; Ctrl-C again leaves at once"
            self._emit(Message("search", text))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.requested = self.interrupted = True


class HangWatch(LivesInDriver, Callback):  # type: ignore[misc]
    """Kills the worker of a trial that makes no progress, so that its slot is free again; emits the steps of others.

    Ray ends a process that does not answer by SIGKILL, so a stopped one goes too (5 s, Ray 2.60). Time counts from the
    last change of the trial's pulse that this process saw, not while it waits for the storage itself, nor while trials
    cannot write pulses. `on_hung` gets Ray's id of a trial before its worker is killed.
    """

    def __init__(self, job: SearchJob, on_hung: Callable[[str], None], emit: Emit) -> None:
        self._trials, self._limit = job.trials, job.config.search.trial_timeout_seconds
        self._on_hung, self._emit = on_hung, emit
        self._seen: dict[str, tuple[object, float]] = {}
        self._pause, self._next_look = min(5.0, self._limit / 4), 0.0
        self._all: list[Any] = []

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Remember the trials for `kill_all`."""
        self._all = trials

    def kill_all(self) -> None:
        """End every worker: when Tune fails, it leaves them at work."""
        for trial in self._all:
            if trial.temporary_state.ray_actor is not None:
                ray.kill(trial.temporary_state.ray_actor)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at the trials' pulses, and kill workers that have stood still for too long."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + self._pause
        at_work = {trial.trial_id: trial for trial in trials if trial.temporary_state.ray_actor is not None}
        seen, self._seen = self._seen, {}
        indices = [trial.config["trial"] for trial in at_work.values()]
        pulses = for_each(lambda index: read_pulse(self._trials, index), indices)
        self._emit(StepsSeen({index: pulse.step for index, pulse in zip(indices, pulses, strict=True) if pulse}))
        for trial_id, pulse in zip(at_work, pulses, strict=True):
            last, stood = seen.get(trial_id, (None, -self._pause))
            self._seen[trial_id] = (pulse, stood + self._pause if pulse == last else 0.0)
        is_slow = any(stood > self._limit / 4 for _, stood in self._seen.values())
        if is_slow and not write_progress(self._trials / "watch", "the driver looks for pulses"):  # full or away
            self._seen = {trial_id: (pulse, 0.0) for trial_id, (pulse, _) in self._seen.items()}
        for trial_id, trial in at_work.items():
            if self._seen[trial_id][1] >= self._limit:
                self._on_hung(trial_id)
                ray.kill(trial.temporary_state.ray_actor)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Drop the averages that Tune keeps of every metric: half of what a trial costs the driver (Ray 2.60)."""
        trial.run_metadata.metric_analysis = {}
        trial.run_metadata.metric_n_steps = {}

    on_trial_error = on_trial_complete
