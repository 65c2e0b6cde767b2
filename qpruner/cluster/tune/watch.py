"""Callbacks of Ray Tune that watch over trials: kill those that hang, drop what nobody reads."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.tune.callback import Callback
from ray.tune.experiment import Trial

from qpruner.cluster.tune.driver import PlanSearcher
from qpruner.cluster.tune.job import LivesInDriver, SearchJob
from qpruner.runs.events import Emit, StepsSeen
from qpruner.search.trial_records import can_write_pulses, read_pulses


class HangWatch(LivesInDriver, Callback):  # type: ignore[misc]
    """Kills the worker of a trial that makes no progress, so that its slot is free again; emits the steps of others.

    Ray ends a process that does not answer by SIGKILL, so a stopped one goes too (5 s, Ray 2.60). Time counts from the
    last change of the trial's pulse that this process saw, not while it waits for the storage itself, nor while trials
    cannot write pulses. A trial may wait for the worker of the trial before it; if that does not end, this one does not
    hang.
    """

    def __init__(self, job: SearchJob, searcher: PlanSearcher, emit: Emit) -> None:
        self._trials, self._limit = job.trials, job.config.search.trial_timeout_seconds
        self._searcher, self._emit = searcher, emit
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
        pulses = read_pulses(self._trials, indices)
        self._emit(StepsSeen({index: pulse.step for index, pulse in zip(indices, pulses, strict=True) if pulse}))
        for trial_id, pulse in zip(at_work, pulses, strict=True):
            last, stood = seen.get(trial_id, (None, -self._pause))
            self._seen[trial_id] = (pulse, stood + self._pause if pulse == last else 0.0)
        if any(stood > self._limit / 4 for _, stood in self._seen.values()) and not can_write_pulses(self._trials):
            self._seen = {trial_id: (pulse, 0.0) for trial_id, (pulse, _) in self._seen.items()}
        for trial_id, trial in at_work.items():
            if self._seen[trial_id][1] >= self._limit:
                runs = trial.status == Trial.RUNNING
                (self._searcher.on_hung if runs else self._searcher.on_never_started)(trial_id)
                ray.kill(trial.temporary_state.ray_actor)


class Forgetful(LivesInDriver, Callback):  # type: ignore[misc]
    """Drops the averages that Tune keeps of every metric of every trial, once a trial is over.

    Nobody reads them, and they stay until the search ends (Ray 2.60): half of what a trial costs the driver.
    """

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Drop them."""
        trial.run_metadata.metric_analysis = {}
        trial.run_metadata.metric_n_steps = {}

    on_trial_error = on_trial_complete
