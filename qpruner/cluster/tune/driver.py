"""What lives in the driver while Tune runs: the searcher that hands out plans and tells how trials go, and the watch
over trials that hang."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.tune.callback import Callback
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from qpruner.cluster.nodes import kernel_kills_on, node_in, stays
from qpruner.cluster.tune.actors import KILLED_FOR_MEMORY
from qpruner.cluster.tune.halt import Halt
from qpruner.cluster.tune.job import (
    METRIC,
    TIME,
    LivesInDriver,
    SearchJob,
    ending_of,
    observations_of,
    smaller_batch,
)
from qpruner.errors import QprunerError, StageError, StorageError
from qpruner.runs.events import Emit, Message, Progress, StepsSeen, TrialChanged, TrialWithdrawn
from qpruner.runs.lock import lock_lost
from qpruner.runs.records import TrialPulse, TrialRecord
from qpruner.runs.storage import display_name, exists, remove
from qpruner.search.searchers import Ledger, Observation, Suggestion
from qpruner.search.trial_records import (
    begin_trial,
    read_pulse,
    read_pulses,
    read_seconds,
    read_trial,
    read_trials,
    remove_old_checkpoints,
    takes_pulses,
    trial_folder,
    trial_path,
    write_seconds,
    write_trial,
)

MAX_KILLS = 3
"""Deaths of its worker process for one cause, memory or another, at which a trial without a rung between them fails, on
machines that live on."""
MAX_ERRORS = 3
"""Trials that may end in an error on one machine without a rung of any there, before the machine is what is broken."""


def _or_ends(take: Callable[..., None]) -> Callable[..., None]:
    """What the searcher takes from Tune while that handles a result; an error of ours then ends the search."""

    @functools.wraps(take)
    def took(self: PlanSearcher, *args: Any, **kwargs: Any) -> None:
        try:
            take(self, *args, **kwargs)
        except QprunerError as error:
            self._halt.end(error, at_once=True)

    return took


class PlanSearcher(LivesInDriver, Searcher):  # type: ignore[misc]
    """Hands the ledger's suggestions to Tune and writes each trial's record before it runs."""

    def __init__(self, job: SearchJob, ledger: Ledger, room: Callable[[], int], emit: Emit, halt: Halt) -> None:
        super().__init__(metric=METRIC, mode="min")
        self._job, self._ledger, self._room, self._emit, self._halt = job, ledger, room, emit, halt
        # Made once: Tune keeps every trial's parameters to the end.
        self._keys = tuple(f"bits/{name}" for name in job.space.groups)
        self._live: dict[str, Suggestion] = {}
        self._hung: set[str] = set()
        self._kept_waiting: set[str] = set()
        self._died_on: dict[str, str] = {}
        self._starved: dict[str, str] = {}
        self._killed_by_ray: set[str] = set()
        self._failed_on: dict[str | None, list[TrialRecord]] = {}
        recorded = read_trials(job.trials)
        self._recorded = {record.index for record in recorded}
        self._done = sum(1 for record in recorded if job.owns(record) and record.status != "running")
        self._clock = _Clock(job, recorded)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        self._hours_are_over()
        if not self._halt.requested and len(self._live) >= self._room():
            return None
        finished: str = Searcher.FINISHED
        suggestion = None if self._halt.requested else self._ledger.next()
        if suggestion is None:
            return finished
        if suggestion.index in self._recorded:
            record = read_trial(self._job.trials, suggestion.index)
        else:
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
            path = trial_path(self._job.trials, record.index)
            if exists(path):  # this search read all that there were, and wrote the others itself
                self._halt.end(lock_lost("search", f"it wrote {display_name(path)}"), at_once=True)
                return finished
            begin_trial(self._job.trials, record)
            self._recorded.add(record.index)
        self._live[trial_id] = suggestion
        self._emit(TrialChanged(record))
        about = {"plan_bytes": record.plan_bytes, "mean_bits": record.mean_bits}
        bits = dict(zip(self._keys, suggestion.plan.bits, strict=True))
        return {"trial": suggestion.index, "origin": suggestion.origin, **about, **bits}

    # Ray calls these by keyword, so the parameters keep its names.
    @_or_ends
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        suggestion = self._live[trial_id]
        is_news = self._ledger.observe(
            Observation(suggestion.index, suggestion.plan, int(result[TIME]), float(result[METRIC]))
        )
        record = read_trial(self._job.trials, suggestion.index)
        if is_news:
            self._failed_on.pop(record.node, None)
        self._clock.tick(record)
        self._emit(TrialChanged(record))

    @_or_ends
    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        suggestion = self._live.pop(trial_id)
        record = read_trial(self._job.trials, suggestion.index)
        self._clock.tick(record)
        if record.status == "running" and self._halt.requested:
            return
        if not error and not record.has_begun:
            self._withdraw(suggestion)
            return
        if record.status == "running":
            # A trial's own errors are in its record: this one's process was killed, or never came up.
            record = self._killed(record, trial_id) if error else self._stopped(record)
        if record.is_over:
            record = record.model_copy(update={"times": (*record.times, time.time())})
        write_trial(self._job.trials, record)
        if not record.is_over:
            place = f"step {record.rungs[-1].step}" if record.rungs else "its start"
            why = ", which Ray killed for memory," if trial_id in self._killed_by_ray else ""
            self._emit(Message("search", f"trial {record.index} lost its worker{why} and goes on from {place}"))
            self._ledger.hand_out_again(suggestion)
            return
        if record.failure != "hung":  # it may be at work still
            try:
                remove_old_checkpoints(self._job.trials, [record])
            except OSError as error:  # takes nothing from a trial that is over
                self._emit(Message("search", f"warning: an old checkpoint stays where it is: {error}"))
        for observation in observations_of(record, self._job.config):
            self._ledger.observe(observation)
        self._ledger.close(suggestion, ending_of(record))
        self._done += 1
        self._emit(TrialChanged(record))
        self._emit(Progress("search", self._done, self._job.config.num_trials))
        if record.failure in ("storage", "damaged"):
            self._halt.requested = True
        elif record.failure == "error":
            self._suspect(record)

    def is_recalled(self, trial_id: str) -> bool:
        """Whether a trial that waits for a machine is not to start any more."""
        over = self._hours_are_over()
        if self._halt.requested:
            return True
        suggestion = self._live.get(trial_id)
        if suggestion is None or not over:
            return False
        return not read_trial(self._job.trials, suggestion.index).has_begun

    def _hours_are_over(self) -> bool:
        """Whether the search's hours are spent. Where no machine is left by then, and none may come, what was begun
        can neither go on nor be confirmed: the search ends with that."""
        over = self._clock.is_over(self._ledger)
        if over and not self._room():
            cause = f"{self._ledger.ended}, and no machine is left that could run a trial"
            remedy = "bring machines back (`ray start` on them), then repeat the command: what was begun goes on"
            self._halt.end(StageError("search", cause, remedy))
        return over

    def _withdraw(self, suggestion: Suggestion) -> None:
        """Have a trial that never began never have been."""
        remove(trial_folder(self._job.trials, suggestion.index))
        self._recorded.discard(suggestion.index)
        self._ledger.withdraw(suggestion)
        self._emit(TrialWithdrawn(suggestion.index))

    def hear(self, trial_id: str, error: str) -> None:
        """Take the error that a trial is about to end in."""
        self._halt.hear(error)
        node = node_in(error)
        if node:
            self._died_on[trial_id] = node
        found = re.search(rf"^[\w.]*\b{StorageError.__name__}: (.+)$", error, re.MULTILINE)
        if found:
            self._starved[trial_id] = found[1]
        if KILLED_FOR_MEMORY in error:
            self._killed_by_ray.add(trial_id)

    def hangs(self, trial_id: str) -> None:
        """Tell that a trial is killed for want of progress."""
        self._hung.add(trial_id)

    def waits_in_vain(self, trial_id: str) -> None:
        """Tell that a trial's worker is killed because it does not leave the trial before it."""
        self._kept_waiting.add(trial_id)

    def _suspect(self, record: TrialRecord) -> None:
        """Halt where one trial after the other fails on one machine, which takes the next plan as soon as it is free;
        those trials are tried again when the command is repeated."""
        failed = self._failed_on.setdefault(record.node, [])
        failed.append(record)
        if len(failed) < MAX_ERRORS:
            return
        self._halt.requested = True
        what = f"{len(failed)} trials in a row failed on {record.node}"
        for each in failed:
            reason = f"{what}, trial {each.index} with {each.reason}"
            write_trial(self._job.trials, each.model_copy(update={"failure": "machine", "reason": reason}))
        self._emit(Message("search", f"warning: {what}; running rungs finish, nothing new starts"))

    def _stopped(self, record: TrialRecord) -> TrialRecord:
        step = record.rungs[-1].step
        if step >= self._job.config.search.steps:
            return record.model_copy(update={"status": "finished"})
        reason = f"stopped by ASHA at step {step}"
        return record.model_copy(update={"status": "stopped", "reason": reason})

    def _killed(self, record: TrialRecord, trial_id: str) -> TrialRecord:
        """The record of a trial whose worker is dead: hung, lost too often, or to go on elsewhere."""
        if trial_id in self._kept_waiting:
            return record
        pulse = read_pulse(self._job.trials, record.index)
        record = _as_last_seen(record, pulse)
        if trial_id in self._starved:
            # Its worker could not even write that.
            reason = f"{self._starved[trial_id]} (on {record.node})"
            return record.model_copy(update={"status": "failed", "failure": "storage", "reason": reason})
        if trial_id in self._hung:
            limit = self._job.config.search.trial_timeout_seconds
            reason = f"no progress for {limit:g} s (`search.trial_timeout_seconds`); its worker was killed"
            return record.model_copy(update={"status": "failed", "failure": "hung", "reason": reason})
        if trial_id in self._killed_by_ray:
            return _killed_for_memory(record, self._job, "Ray")
        # What dies with its machine, or leaves one that is about to go, says nothing of the trial.
        node = self._died_on.pop(trial_id, None) or (pulse.node if pulse else None)
        if node is not None and not stays(node):
            return record
        if pulse and pulse.node == node and (kernel_kills_on(node) or 0) > (pulse.kernel_kills or 0):
            return _killed_for_memory(record, self._job, "the kernel")
        return _with_kill(record, "kills", "lost", "its worker process died {} times in a row")

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the trials' records are the searcher's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore; see `save`."""


def _as_last_seen(record: TrialRecord, pulse: TrialPulse | None) -> TrialRecord:
    """The record with the memory and the time that a worker's last sign of life tells."""
    if pulse is None:
        return record
    spent = {"seconds": max(record.seconds, pulse.seconds), "gpu_seconds": max(record.gpu_seconds, pulse.gpu_seconds)}
    return record.model_copy(update={"peak_memory_bytes": pulse.peak_memory_bytes} | spent)


def _killed_for_memory(record: TrialRecord, job: SearchJob, by: str) -> TrialRecord:
    """The record of a trial whose worker was killed, by Ray or the kernel, because its machine ran out of memory; such
    kills count where its micro-batch can be no smaller."""
    smaller = smaller_batch(record, job.config)
    if smaller is not None:
        return record.model_copy(update={"micro_batch_size": smaller})
    reason = f"out of memory: {by} killed its worker {{}} times in a row"
    return _with_kill(record, "memory_kills", "infeasible", reason)


def _with_kill(record: TrialRecord, counter: str, failure: str, reason: str) -> TrialRecord:
    """The record with one more kill of a kind; with too many of them, it is that of a trial that failed."""
    kills = getattr(record, counter) + 1
    failed = {"status": "failed", "failure": failure, "reason": reason.format(kills)} if kills >= MAX_KILLS else {}
    return record.model_copy(update={counter: kills} | failed)


class HangWatch(LivesInDriver, Callback):  # type: ignore[misc]
    """Kills the worker of a trial that makes no progress, so that its slot is free again; tells of those that do.

    Ray ends the process by SIGKILL where it does not answer, so a stopped one goes too (5 s, Ray 2.60). Time counts
    from the last change of the trial's pulse that this process saw, whatever the machines' clocks say, and from one
    look to the next: not while this process waits for the storage itself, nor while trials cannot tell of progress. A
    trial that is given the worker of another has it before it runs; if that one does not end, this one is not what
    hangs.
    """

    def __init__(self, job: SearchJob, searcher: PlanSearcher, emit: Emit) -> None:
        self._trials, self._limit = job.trials, job.config.search.trial_timeout_seconds
        self._searcher, self._emit = searcher, emit
        self._seen: dict[str, tuple[object, float]] = {}
        self._pause, self._next_look = min(5.0, self._limit / 4), 0.0
        self._all: list[Any] = []

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._all = trials

    def kill_all(self) -> None:
        """End every worker: when Tune fails, it leaves them at work."""
        for trial in self._all:
            if trial.temporary_state.ray_actor is not None:
                ray.kill(trial.temporary_state.ray_actor)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
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
        if any(stood > self._limit / 4 for _, stood in self._seen.values()) and not takes_pulses(self._trials):
            self._seen = {trial_id: (pulse, 0.0) for trial_id, (pulse, _) in self._seen.items()}
        for trial_id, trial in at_work.items():
            if self._seen[trial_id][1] >= self._limit:
                runs = trial.status == Trial.RUNNING
                (self._searcher.hangs if runs else self._searcher.waits_in_vain)(trial_id)
                ray.kill(trial.temporary_state.ray_actor)


class Forgetful(LivesInDriver, Callback):  # type: ignore[misc]
    """Drops the averages that Tune keeps of every metric of every trial, and their JSON, once a trial is over.

    Nobody reads them, and they stay until the search ends (Ray 2.60): half of what a trial costs the driver.
    """

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial.run_metadata.metric_analysis = {}
        trial.run_metadata.metric_n_steps = {}

    on_trial_error = on_trial_complete


class _Clock:
    """What a search has spent, all its sessions together, and the end that its settings put to it."""

    def __init__(self, job: SearchJob, recorded: Sequence[TrialRecord]) -> None:
        self._job = job
        self._gpu_seconds = {record.index: record.gpu_seconds_of(job.search) for record in recorded}
        self._before, self._started = read_seconds(job.trials, job.search), time.monotonic()
        self._is_over, self._next_look = False, 0.0

    def tick(self, record: TrialRecord) -> None:
        """Keep the time, and what a trial held: a session may be killed at any instant."""
        self._gpu_seconds[record.index] = record.gpu_seconds_of(self._job.search)
        if not write_seconds(self._job.trials, self._job.search, self._seconds(), self._job.session):
            raise lock_lost("search", "it began a session of this search")

    def is_over(self, ledger: Ledger) -> bool:
        """Whether the search's hours are spent; ends it then. Looks once a second."""
        now = time.monotonic()
        if not self._is_over and now >= self._next_look:
            self._next_look = now + 1.0
            reason = self._reason()
            if reason is not None:
                self._is_over = True
                ledger.end(reason)
        return self._is_over

    def _reason(self) -> str | None:
        settings = self._job.config.search
        hours = self._seconds() / 3600
        if settings.max_hours is not None and hours >= settings.max_hours:
            return f"{hours:.3g} hours were spent (`search.max_hours` is {settings.max_hours:g})"
        if settings.max_gpu_hours is not None:
            held = sum(self._gpu_seconds.values()) / 3600
            if held >= settings.max_gpu_hours:
                return f"{held:.3g} GPU hours were spent (`search.max_gpu_hours` is {settings.max_gpu_hours:g})"
        return None

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started
