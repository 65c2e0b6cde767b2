"""What lives in the driver while Tune runs: the searcher that hands out plans and tells how trials go."""

from __future__ import annotations

import time
from typing import Any

from ray.tune.search import Searcher

from qpruner.events import Emit, Progress, TrialChanged
from qpruner.records import TrialRecord
from qpruner.rundir import read_json
from qpruner.search.searchers import Ledger, Observation, Suggestion
from qpruner.search.trial_records import read_seconds, read_trials, trial_path, write_seconds, write_trial
from qpruner.search.tune.job import METRIC, TIME, SearchJob, observations_of


class _LivesInDriver:
    """Tune pickles searcher and callbacks into a snapshot that is never restored; these hold the terminal, so they
    leave nothing there."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class PlanSearcher(_LivesInDriver, Searcher):  # type: ignore[misc]
    """Hands the ledger's suggestions to Tune and writes each trial's record before it runs."""

    def __init__(self, job: SearchJob, ledger: Ledger, emit: Emit) -> None:
        super().__init__(metric=METRIC, mode="min")
        self._job, self._ledger, self._emit = job, ledger, emit
        self._live: dict[str, Suggestion] = {}
        self._done = sum(1 for record in read_trials(job.trials) if job.owns(record) and record.status != "running")
        self._clock = _Clock(job)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        self._clock.end_in_time(self._ledger)
        suggestion = self._ledger.next()
        if suggestion is None:
            finished: str = Searcher.FINISHED
            return finished
        self._live[trial_id] = suggestion
        record = read_json(trial_path(self._job.trials, suggestion.index), TrialRecord)
        if record is None:
            layout = self._job.layout
            record = TrialRecord(
                index=suggestion.index,
                digest=self._job.digest,
                search=self._job.search,
                origin=suggestion.origin,
                expected_improvement=suggestion.expected_improvement,
                noise=suggestion.noise,
                plan=suggestion.plan.as_dict(),
                plan_bytes=layout.plan_bytes(suggestion.plan),
                mean_bits=layout.mean_bits(suggestion.plan),
                status="running",
                times=(time.time(),),
            )
            write_trial(self._job.trials, record)
        self._emit(TrialChanged(record))
        bits = {f"bits/{name}": value for name, value in suggestion.plan.as_dict().items()}
        return {"trial": suggestion.index, "origin": suggestion.origin, **bits}

    # Ray calls these by keyword, so the parameters keep its names.
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._clock.tick()
        suggestion = self._live[trial_id]
        stderr = result.get("accuracy_stderr") if self._job.config.search.metric == "accuracy" else None
        self._ledger.observe(
            Observation(suggestion.index, suggestion.plan, int(result[TIME]), float(result[METRIC]), stderr)
        )
        record = read_json(trial_path(self._job.trials, suggestion.index), TrialRecord)
        assert record is not None
        self._emit(TrialChanged(record))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._clock.tick()
        suggestion = self._live.pop(trial_id)
        record = read_json(trial_path(self._job.trials, suggestion.index), TrialRecord)
        assert record is not None
        update: dict[str, Any] = {"times": (*record.times, time.time())}
        if record.status == "running":
            update |= (
                {"status": "failed", "reason": "the worker process died"}
                if error
                else {"status": "stopped", "reason": f"stopped by ASHA at step {record.rungs[-1].step}"}
            )
        record = record.model_copy(update=update)
        write_trial(self._job.trials, record)
        for observation in observations_of(record, self._job.config):
            self._ledger.observe(observation)
        self._ledger.close(suggestion)
        self._done += 1
        self._emit(TrialChanged(record))
        self._emit(Progress("search", self._done, self._job.config.search.max_trials))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the trials' records are the searcher's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore; see `save`."""


class _Clock:
    """What a search has spent, all its sessions together, and the end that its settings put to it."""

    def __init__(self, job: SearchJob) -> None:
        self._job = job
        self._before, self._started = read_seconds(job.trials, job.search), time.monotonic()

    def tick(self) -> None:
        """Keep the time: a session may be killed at any instant."""
        write_seconds(self._job.trials, self._job.search, self._seconds())

    def end_in_time(self, ledger: Ledger) -> None:
        """End the search once its hours are spent."""
        settings = self._job.config.search
        hours = self._seconds() / 3600
        if settings.max_hours is not None and hours >= settings.max_hours:
            ledger.end(f"{hours:.3g} hours were spent (`search.max_hours` is {settings.max_hours:g})")
        if settings.max_gpu_hours is not None:
            held = sum(record.gpu_seconds for record in read_trials(self._job.trials) if self._job.owns(record)) / 3600
            if held >= settings.max_gpu_hours:
                ledger.end(f"{held:.3g} GPU hours were spent (`search.max_gpu_hours` is {settings.max_gpu_hours:g})")

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started
