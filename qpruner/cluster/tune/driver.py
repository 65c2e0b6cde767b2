"""The searcher of Ray Tune in the driver: gives plans to Tune and records how trials end."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qpruner.cluster import ray_private
from qpruner.cluster.tasks import is_staying
from qpruner.cluster.tune.callbacks import KILLED_FOR_MEMORY, Halt, Hold
from qpruner.cluster.tune.devices import Devices
from qpruner.cluster.tune.job import (
    METRIC,
    TIME,
    LivesInDriver,
    SearchJob,
    observations_of,
    plan_to_params,
    smaller_batch,
)
from qpruner.errors import QprunerError, StageError, StorageError
from qpruner.models.memory import kernel_kills
from qpruner.runs.events import Emit, Message, Progress, TrialChanged
from qpruner.runs.lock import lock_lost
from qpruner.runs.records import TrialPulse, TrialRecord
from qpruner.runs.storage import display_name, exists, remove
from qpruner.search import trial_records
from qpruner.search.searchers import Ledger, Observation, Suggestion

MAX_KILLS = 3
"""Worker deaths in a row that fail a trial: without a checkpoint between them, on machines that
stay. Deaths for memory are counted apart, because they say that the plan is infeasible."""
MAX_ERRORS = 3
"""Trials in a row that failed with an error wherever they were tried, which end the search."""
KERNEL_SECONDS = 20.0
"""Time for a machine to report its kernel's kills: it was just out of memory, and has to start a
process."""


def _ends_search(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap a method so that an error of qpruner that it raises ends the search (see `Halt.end`)."""

    @functools.wraps(method)
    def wrapped(self: PlanSearcher, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except QprunerError as error:
            self._halt.end(error, at_once=True)

    return wrapped


class PlanSearcher(LivesInDriver, Searcher):  # type: ignore[misc]
    """Gives Tune the plans that a `searchers.Ledger` suggests.

    It writes the record of each trial before the trial runs.
    """

    def __init__(
        self,
        job: SearchJob,
        ledger: Ledger,
        room: Callable[[int], int],
        devices: Devices,
        emit: Emit,
        halt: Halt,
    ) -> None:
        super().__init__(metric=METRIC, mode="min")
        self._job = job
        self._ledger = ledger
        self._room = room
        self._devices = devices
        self._emit = emit
        self._halt = halt
        self._live: dict[str, Suggestion] = {}
        self._deaths: dict[str, _Death] = {}
        self._errors: list[TrialRecord] = []
        """Trials that failed with an error since the last score."""
        recorded = trial_records.read_trials(job.trials)
        self._recorded = {record.index for record in recorded}
        over = [record for record in recorded if record.status != "running"]
        self._done = sum(job.owns(record) for record in over)
        self._gpu_seconds = {record.index: record.gpu_seconds_of(job.search) for record in recorded}
        self._earlier_seconds = trial_records.read_clock(job.trials, job.search).seconds
        self._started = time.monotonic()
        self._is_over = False
        self._next_look = 0.0

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the parameters of the next trial, or FINISHED at the end.

        Return None while no more trials may be in flight, and while the next plan is being
        proposed: Tune asks again after it has taken reports. Wait only if no trial could report.
        """
        self._look()
        finished: str = Searcher.FINISHED
        if self._halt.requested:
            return finished
        free = self._room(self._devices.num_held) - len(self._live)
        if free <= 0:
            return None
        suggestion = self._ledger.poll(free) if self._live else self._ledger.next()
        if suggestion is None:
            # Live trials may have to be resumed, or be tried on other devices.
            return None if self._live else finished
        record = self._record_of(suggestion)
        if record is None:
            return finished
        self._live[trial_id] = suggestion
        self._emit(TrialChanged(record))
        return {
            "trial": suggestion.index,
            "origin": suggestion.origin,
            "cut": record.cut,
            "plan_bytes": record.plan_bytes,
            "mean_bits": record.mean_bits,
            **plan_to_params(suggestion.plan),
        }

    def _record_of(self, suggestion: Suggestion) -> TrialRecord | None:
        """Read or create the record of a trial.

        Return None, and end the search, if another process has created it meanwhile.
        """
        job = self._job
        if suggestion.index in self._recorded:
            return trial_records.read_trial(job.trials, suggestion.index)
        layout = job.layouts[suggestion.plan.cut]
        record = TrialRecord(
            index=suggestion.index,
            digest=job.digest,
            search=job.search,
            origin=suggestion.origin,
            cut=suggestion.plan.cut,
            model=job.materials.model_of(suggestion.plan.cut),
            plan=suggestion.plan.as_dict(),
            plan_bytes=layout.plan_bytes(suggestion.plan),
            mean_bits=layout.mean_bits(suggestion.plan),
            status="running",
            times=(time.time(),),
        )
        path = trial_records.trial_path(job.trials, record.index)
        if exists(path):  # neither read at the start nor written by this process
            self._halt.end(
                lock_lost("search", f"the other wrote {display_name(path)}"), at_once=True
            )
            return None
        trial_records.write_trial(job.trials, record)
        self._recorded.add(record.index)
        return record

    # Ray passes the arguments by name, so the parameters have Ray's names.
    @_ends_search
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Add the score of a rung to the `Ledger`, and emit the record of the trial."""
        suggestion = self._live[trial_id]
        rung = Observation(
            suggestion.index, suggestion.plan, int(result[TIME]), float(result[METRIC])
        )
        is_new = self._ledger.observe(rung)
        record = trial_records.read_trial(self._job.trials, suggestion.index)
        if is_new:
            self._note_score(record)
        self._save_time(record)
        self._emit(TrialChanged(record))

    @_ends_search
    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record how a trial ended; if only its worker died, queue the trial to be resumed."""
        suggestion = self._live.pop(trial_id)
        death = self._deaths.pop(trial_id, _Death())
        record = trial_records.read_trial(self._job.trials, suggestion.index)
        self._save_time(record)
        if record.status == "running" and self._halt.requested:
            return
        if not error and not record.has_begun:
            # It was cancelled while it waited: delete it, as if it had never been proposed.
            remove(trial_records.trial_folder(self._job.trials, suggestion.index))
            self._recorded.discard(suggestion.index)
            self._ledger.withdraw(suggestion)
            self._emit(TrialChanged(record, is_withdrawn=True))
            return
        failure = None
        if record.status != "running":
            if record.failure in ("infeasible", "error"):
                failure = record.reason
        elif not error:
            record = _stopped(record, self._job)
        else:
            # An error of the trial itself is in its record: here the process was killed, or never
            # started.
            num_kills = record.kills + record.memory_kills
            record = _after_death(record, death, self._job)
            if record.kills + record.memory_kills > num_kills and not record.is_over:
                failure = "its worker process died"
        if failure and self._devices.should_move(record, death.hold):
            self._move(suggestion, record, failure)
            return
        if record.is_over:
            record = record.model_copy(update={"times": (*record.times, time.time())})
        trial_records.write_trial(self._job.trials, record)
        if record.is_over:
            self._end_trial(suggestion, record)
            self._devices.release(record.index)
            return
        place = f"step {record.saved_step}" if record.saved_step else "its start"
        why = ", which Ray killed for memory," if death.by_ray else ""
        text = f"trial {record.index} lost its worker{why} and is resumed from {place}"
        self._emit(Message("search", text))
        self._ledger.hand_out_again(suggestion)

    def _move(self, suggestion: Suggestion, record: TrialRecord, failure: str) -> None:
        """Queue a trial that failed, to be resumed on another device.

        It begins there with the configured micro-batch, and its deaths count from 0.
        """
        update = {
            "status": "running",
            "failure": None,
            "reason": None,
            "micro_batch_size": None,
            "kills": 0,
            "memory_kills": 0,
            "failed_on": (*record.failed_on, record.device),
        }
        moved = record.model_copy(update=update)
        trial_records.write_trial(self._job.trials, moved)
        text = (
            f"trial {record.index} failed on {record.device} ({failure}) and is tried on another "
            "device"
        )
        self._emit(Message("search", text))
        self._emit(TrialChanged(moved))
        self._ledger.hand_out_again(suggestion)

    def _end_trial(self, suggestion: Suggestion, record: TrialRecord) -> None:
        """Add the scores of an ended trial to the `Ledger` and report the trial.

        Its old checkpoints are deleted.
        """
        if record.failure != "hung":  # the worker of a hung trial may still write
            try:
                trial_records.remove_old_checkpoints(self._job.trials, [record])
            except OSError as error:
                text = f"warning: an old checkpoint could not be deleted: {error}"
                self._emit(Message("search", text))
        for observation in observations_of(record, self._job.config):
            self._ledger.observe(observation)
        self._ledger.close(suggestion, record.plan_failed)
        if record.status in ("finished", "stopped"):
            self._note_score(record)  # Tune reports the last rung with the trial's end alone
        self._done += 1
        self._emit(TrialChanged(record))
        self._emit(Progress("search", self._done, self._job.config.num_trials))
        if record.failure in ("storage", "damaged"):
            self._halt.requested = True
        elif record.failure == "error":
            self._halt_after_errors(record)

    def _note_score(self, record: TrialRecord) -> None:
        """Note that a trial has reported a score: its device works, and errors are not in a row."""
        self._errors.clear()
        self._devices.has_scored(record)

    def is_cancelled(self, trial_id: str) -> bool:
        """Return True if a trial that waits for a machine must not start any more."""
        is_over = self._look()
        suggestion = self._live.get(trial_id)
        if self._halt.requested or not (is_over and suggestion):
            return self._halt.requested
        return not trial_records.read_trial(self._job.trials, suggestion.index).has_begun

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._started

    def _save_time(self, record: TrialRecord) -> None:
        """Count the GPU seconds of a trial, and save the time of all sessions.

        It is saved at once, because the process may be killed at any moment.
        """
        job = self._job
        self._gpu_seconds[record.index] = record.gpu_seconds_of(job.search)
        if not trial_records.write_seconds(job.trials, job.search, self._seconds(), job.session):
            raise lock_lost("search", "the other began a session of this search")

    def _look(self) -> bool:
        """Return True after a time limit.

        End the search if no machine or device is left that could run a trial.
        """
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + 1.0
            self._look_at_limits()
            try:
                self._devices.look()
            except StageError as error:
                self._halt.end(error)
        if self._is_over and not self._room(0):
            cause = f"{self._ledger.ended}, and no machine is left that could run a trial"
            remedy = (
                "start machines again (`ray start` on them), then repeat the command: "
                "it resumes running trials"
            )
            self._halt.end(StageError("search", cause, remedy))
        return self._is_over

    def _look_at_limits(self) -> None:
        """Suggest no more trials after a time limit."""
        gpu_seconds = sum(self._gpu_seconds.values())
        self._look_at(self._seconds(), "max_hours", "hours")
        self._look_at(gpu_seconds, "max_gpu_hours", "GPU hours")

    def _look_at(self, seconds: float, key: str, unit: str) -> None:
        hours = seconds / 3600
        limit = getattr(self._job.config.search, key)
        if limit is not None and hours >= limit and not self._is_over:
            self._is_over = True
            self._ledger.end(f"{hours:.3g} {unit} were spent (`search.{key}` is {limit:g})")

    def on_error_text(self, trial_id: str, error: str, hold: Hold = lambda: None) -> None:
        """Store what the error of a trial says about the death of its worker.

        It is called before `on_trial_complete`.
        """
        self._halt.on_error_text(error)
        death = self._deaths.setdefault(trial_id, _Death())
        death.hold = hold
        # Ray (2.60) writes `actor_id: ID` if an actor died, and `The actor ID is unavailable` if
        # its connection broke.
        actor = re.search(r"\bactor(?:_id[:=])? ?([0-9a-f]{32})\b", error)
        if actor:
            address = ray_private.state.actor_table(actor[1]).get("Address", {})
            death.node = address.get("NodeID") or death.node
        storage = re.search(rf"^[\w.]*\b{StorageError.__name__}: (.+)$", error, re.MULTILINE)
        if storage:
            death.storage = storage[1]
        death.by_ray = death.by_ray or KILLED_FOR_MEMORY in error

    def on_hung(self, trial_id: str, is_running: bool) -> None:
        """Store why a worker is killed.

        Its trial makes no progress or, unless `is_running`, never started there.
        """
        death = self._deaths.setdefault(trial_id, _Death())
        death.hung = is_running
        death.never_started = not is_running

    def _halt_after_errors(self, record: TrialRecord) -> None:
        """Halt the search after `MAX_ERRORS` trials in a row have failed.

        No other device is left to try them on, and the next plans would fail too. The failed
        trials are retried when the command is repeated.
        """
        self._errors.append(record)
        if len(self._errors) < MAX_ERRORS:
            return
        self._halt.requested = True
        text = f"{len(self._errors)} trials in a row failed, the last on {record.device}"
        for trial in self._errors:
            reason = f"{text}, trial {trial.index} with {trial.reason}"
            failed = trial.model_copy(update={"failure": "machine", "reason": reason})
            trial_records.write_trial(self._job.trials, failed)
        self._emit(Message("search", f"warning: {text}; running trials stop at the next rung"))

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the state of the searcher is in the records of the trials."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, as `save`."""


@dataclass
class _Death:
    """What the driver knows about the failure of a trial or the death of its worker."""

    hold: Hold = lambda: None  # holds the device of the worker
    node: str | None = None  # Ray's id of the worker's node
    storage: str = ""  # the message of a storage error
    by_ray: bool = False  # Ray killed the worker for memory
    hung: bool = False  # the driver killed the worker
    never_started: bool = False  # the driver killed the worker, which never left its previous trial


def _stopped(record: TrialRecord, job: SearchJob) -> TrialRecord:
    """Return the record of a trial after its last rung: finished, or stopped by ASHA."""
    step = record.rungs[-1].step
    update = {"status": "finished"}
    if step < job.config.search.steps:
        update = {"status": "stopped", "reason": f"stopped by ASHA at step {step}"}
    return record.model_copy(update=update)


def _after_death(record: TrialRecord, death: _Death, job: SearchJob) -> TrialRecord:
    """Return the record of a trial after the death of its worker.

    The trial has failed, or its status is running, which means that it is to be resumed.
    """
    if death.never_started:
        return record
    pulse = trial_records.read_pulse(job.trials, record.index)
    if pulse is not None:  # the pulse may be newer than the record
        newest = {
            "seconds": max(record.seconds, pulse.seconds),
            "gpu_seconds": max(record.gpu_seconds, pulse.gpu_seconds),
            "peak_memory_bytes": pulse.peak_memory_bytes,
        }
        record = record.model_copy(update=newest)
    if death.storage:
        # The worker could not write its own record.
        return _failed(record, "storage", f"{death.storage} (on {record.node})")
    if death.hung:
        limit = job.config.search.trial_timeout_seconds
        reason = (
            f"no progress for {limit:g} s (`search.trial_timeout_seconds`); its worker was killed"
        )
        return _failed(record, "hung", reason)
    # The death of a machine, or an end because the machine is about to leave, does not count
    # against the trial.
    node = death.node or (pulse.node if pulse else None)
    if not death.by_ray and node is not None and not is_staying(node):
        return record
    if not death.by_ray and not _is_kill_for_memory(pulse, node):
        kills = record.kills + 1
        record = record.model_copy(update={"kills": kills})
        reason = f"its worker process died {kills} times in a row"
        return _failed(record, "lost", reason) if kills >= MAX_KILLS else record
    smaller = smaller_batch(record, job.config)
    if smaller is not None:
        return record.model_copy(update={"micro_batch_size": smaller})
    kills = record.memory_kills + 1
    record = record.model_copy(update={"memory_kills": kills})
    by = "Ray" if death.by_ray else "the kernel"
    reason = f"out of memory: {by} killed its worker {kills} times in a row"
    return _failed(record, "infeasible", reason) if kills >= MAX_KILLS else record


def _is_kill_for_memory(pulse: TrialPulse | None, node: str | None) -> bool:
    """Return whether the kernel of a node has killed processes since a worker's last pulse there.

    Return False if the node does not answer.
    """
    if pulse is None or pulse.node != node:
        return False
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    count = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(kernel_kills)
    with suppress(RayError):
        kills: int | None = ray.get(count.remote(), timeout=KERNEL_SECONDS)
        return (kills or 0) > (pulse.kernel_kills or 0)
    return False


def _failed(record: TrialRecord, failure: str, reason: str) -> TrialRecord:
    """Return the record of a failed trial.

    `failure` is the kind, and `reason` the text for people.
    """
    return record.model_copy(update={"status": "failed", "failure": failure, "reason": reason})
