"""Callbacks of Ray Tune that end a search early and kill the workers of trials that hang."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.callback import Callback
from ray.tune.experiment import Trial
from ray.tune.stopper import Stopper
from ray.util import placement_group_table

from qpruner.cluster.ray_private import RayActorManager
from qpruner.cluster.tasks import is_staying
from qpruner.cluster.tune.job import LivesInDriver, SearchJob
from qpruner.errors import NodeDiffers, QprunerError
from qpruner.runs.events import Emit, Message, StepsSeen
from qpruner.runs.records import TrialPulse
from qpruner.runs.storage import for_each, write_progress
from qpruner.search.trial_records import read_pulse
from qpruner.wording import counted

KILLED_FOR_MEMORY = "Ray killed this worker because its machine ran out of memory"


class Holding(NamedTuple):
    """A device that is kept from other trials."""

    node: str
    """Ray's id of the node that the device is part of."""
    let_go: Callable[[], None]
    """Gives the device to others again, who also get it at the end of the session of Tune."""


Hold = Callable[[], Holding | None]
"""Holds the device of a worker that has failed (see `ActorManager.hold`).

It returns None if the node of the device leaves.
"""


class ActorManager(RayActorManager):  # type: ignore[misc]
    """Fails only the trial whose worker Ray killed for memory.

    Tune (2.60) would end the whole session.

    The device of a worker that has failed can be held: the process ends, but its placement group
    stays, and keeps the device from other trials. Ray has no other way to leave out one GPU of a
    machine.
    """

    def __init__(self, resource_manager: Any) -> None:
        super().__init__(resource_manager)
        # The worker whose process has just ended, while Tune handles that.
        self._failing: Any = None
        self._to_hold: set[Any] = set()
        self._held: dict[Any, Any] = {}  # resources by Tune's tracked actor

    def hold(self, tracked_actor: Any) -> Holding | None:
        """Hold the device of a worker whose trial has failed.

        Tune no longer knows a worker whose process has ended.
        """
        worker = tracked_actor or self._failing
        _, live = self._live_actors_to_ray_actors_resources.get(worker, (None, None))
        resources = self._held.get(worker, live)
        if resources is None:
            return None  # it has never started
        table = placement_group_table(resources.placement_group)
        nodes = list(table["bundles_to_node_id"].values())
        node = nodes[0] if nodes else ""
        if not is_staying(node):
            return None
        self._to_hold.add(worker)

        def let_go() -> None:
            self._to_hold.discard(worker)
            self._free_unless_held(worker)

        return Holding(node, let_go)

    def _cleanup_actor(self, tracked_actor: Any) -> None:
        self._cleanup_actor_futures(tracked_actor)
        _, self._held[tracked_actor] = self._live_actors_to_ray_actors_resources.pop(tracked_actor)
        self._live_resource_cache = None
        if tracked_actor is not self._failing:
            self._free_unless_held(tracked_actor)

    def _free_unless_held(self, tracked_actor: Any) -> None:
        if tracked_actor in self._held and tracked_actor not in self._to_hold:
            self._resource_manager.free_resources(self._held.pop(tracked_actor))

    def cleanup(self) -> None:
        """End all workers, and let go of all devices."""
        for resources in self._held.values():
            self._resource_manager.free_resources(resources)
        super().cleanup()  # begins anew, without any that are held

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"{KILLED_FOR_MEMORY}: {exception}")
        worker = tracked_actor_task._tracked_actor
        self._failing = worker if isinstance(exception, RayActorError) else None
        try:
            super()._actor_task_failed(tracked_actor_task, exception)
        finally:
            self._failing = None
            self._free_unless_held(worker)


class Halt(LivesInDriver, Stopper, Callback):  # type: ignore[misc]
    """Ends the session of Tune on Ctrl-C or on request, once running rungs are done.

    On a second Ctrl-C it ends the session at once.
    """

    def __init__(self, emit: Emit) -> None:
        self.requested = False  # the session is to end
        self.interrupted = False  # by Ctrl-C
        self.trouble: QprunerError | None = None  # the error that the search ends with, if any
        self._emit = emit
        self._announced = False
        self._num_running = 0
        self._at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C within this block, if it runs in the main thread.

        No other thread receives signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return True if a trial that reported a rung has to stop now."""
        return self.requested

    def on_error_text(self, error: str) -> None:
        """End the search if a trial's error says that its node is unusable.

        The next trials would fail there too.
        """
        match = re.search(rf"^RuntimeError: {NodeDiffers.__name__}: (.+)$", error, re.MULTILINE)
        if match and self.trouble is None:
            self.end(NodeDiffers(match[1]))
            text = f"warning: {match[1]}; running trials stop at the next rung"
            self._emit(Message("search", text))

    def end(self, trouble: QprunerError, at_once: bool = False) -> None:
        """End the search with this error, or with an earlier one.

        Running rungs are waited for, unless `at_once`.

        The error is stored, because Tune (2.60) would wrap an error raised here and report the
        trial's end twice.
        """
        self.requested = True
        self.trouble = self.trouble or trouble
        self._at_once = self._at_once or at_once

    def stop_all(self) -> bool:
        """Return True if the session has to end and no trial is running any more."""
        return self.requested and not self._num_running

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raise the error that was given to `end` with `at_once`; after a Ctrl-C, say so once."""
        if self.trouble and self._at_once:
            raise self.trouble
        self._num_running = [trial.status for trial in trials].count(Trial.RUNNING)
        if self.interrupted and not self._announced:
            # Not in the signal handler, which may run in the middle of a printed line.
            self._announced = True
            awaited = counted(self._num_running, "running rung")
            text = f"interrupted: waiting for {awaited} to finish; Ctrl-C again leaves at once"
            self._emit(Message("search", text))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.requested = True
        self.interrupted = True


class HangWatch(LivesInDriver, Callback):  # type: ignore[misc]
    """Kills a trial's worker if its pulse (see `TrialPulse`) has not changed for too long.

    It also emits the steps of trials.

    Time does not count while the driver waits for the storage, or while trials cannot write pulses.
    Ray kills a worker with SIGKILL if it does not end within 5 s (Ray 2.60). Before the kill,
    `on_hung` gets Ray's id of the trial, and True if the trial runs; False if it waits, because the
    worker that it was given still hangs in an earlier trial.
    """

    def __init__(self, job: SearchJob, on_hung: Callable[[str, bool], None], emit: Emit) -> None:
        self._trials = job.trials
        self._limit = job.config.search.trial_timeout_seconds
        self._on_hung = on_hung
        self._emit = emit
        self._unchanged: dict[tuple[str, TrialPulse | None], float] = {}
        """Seconds for which a trial, given by its id in Ray, has had the same pulse."""
        self._pause = min(5.0, self._limit / 4)
        self._next_look = 0.0
        self._all: list[Any] = []

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Store the trials for `kill_all`."""
        self._all = trials

    def kill_all(self) -> None:
        """Kill every worker: Tune leaves them running when it fails."""
        for trial in _with_worker(self._all):
            ray.kill(trial.temporary_state.ray_actor)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Read running trials' pulses; kill workers whose pulse has not changed for too long."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + self._pause
        running = _with_worker(trials)
        indices = [trial.config["trial"] for trial in running]
        pulses = for_each(partial(read_pulse, self._trials), indices)
        steps = {index: pulse.step for index, pulse in zip(indices, pulses, strict=True) if pulse}
        self._emit(StepsSeen(steps))

        earlier = self._unchanged
        self._unchanged = {}
        for trial, pulse in zip(running, pulses, strict=True):
            key = (trial.trial_id, pulse)
            self._unchanged[key] = earlier.get(key, -self._pause) + self._pause
        is_slow = max(self._unchanged.values(), default=0.0) > self._limit / 4
        # If the driver cannot write either, the storage is full or unreachable.
        if is_slow and not write_progress(self._trials / "watch", "the driver looks for pulses"):
            self._unchanged = dict.fromkeys(self._unchanged, 0.0)
        for trial, seconds in zip(running, self._unchanged.values(), strict=True):
            if seconds >= self._limit:
                self._on_hung(trial.trial_id, trial.status == Trial.RUNNING)
                ray.kill(trial.temporary_state.ray_actor)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Delete Tune's averages of every metric.

        They are half of the driver's memory for a trial (Ray 2.60).
        """
        trial.run_metadata.metric_analysis = {}
        trial.run_metadata.metric_n_steps = {}

    on_trial_error = on_trial_complete


def _with_worker(trials: list[Any]) -> list[Any]:
    return [trial for trial in trials if trial.temporary_state.ray_actor is not None]
