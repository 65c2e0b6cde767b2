"""The inputs and the outcome of a search under Ray Tune, and how it resumes from the records."""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.plans.plan import Layout, PrecisionPlan, plan_of
from qpruner.plans.space import SearchSpace
from qpruner.runs.records import TrialRecord
from qpruner.search.searchers import Ledger, Observation, Prior, Proposer, Suggestion
from qpruner.search.trial_records import (
    Materials,
    Trial,
    read_trials,
    remove_old_checkpoints,
    write_trial,
)
from qpruner.training import checkpoints

# the name of the score that Tune minimizes: the validation loss, or one minus the accuracy
METRIC = "score"
TIME = "step"


@dataclass(frozen=True)
class SearchJob:
    """The inputs of a search."""

    config: RunConfig
    trial: Trial
    materials: Materials
    layouts: Mapping[str, Layout]  # by cut
    space: SearchSpace
    may_win: Collection[str]  # cuts, of which controls may have further ones
    controls: Sequence[tuple[str, PrecisionPlan]]  # (origin, plan): see `pipeline/controls.py`
    priors: Mapping[str, Prior]  # sensitivities by method
    trials: Path  # contains a folder for each trial
    scratch: Path  # for the files of Ray Tune
    digest: str  # of all that the result of a trial depends on
    search: str  # digest of the further inputs that the proposals depend on
    resources: dict[str, float]  # of one trial
    check_node: bytes  # from `node_check.packed_check`; raises on an unusable node
    session: int = 1  # the number of this session of the search
    # The driver reads this value, so that tests can set it.
    save_seconds: float = field(default_factory=lambda: checkpoints.SECONDS)

    def owns(self, record: TrialRecord) -> bool:
        """Return True if a trial belongs to this search.

        Other searches have another budget or searcher.
        """
        return record.search == self.search

    def control_of(self, plan: PrecisionPlan) -> str | None:
        """Return the name of the control that has this plan, such as `unpruned-uniform`.

        Return None if no control has it.
        """
        return next((origin for origin, control in self.controls if control == plan), None)

    def fits(self, cut: str, plan_bytes: int) -> bool:
        """Return True if a plan of a cut with these bytes may win."""
        return cut in self.may_win and plan_bytes <= self.space.budget_bytes

    def may_run(self, plan: PrecisionPlan) -> bool:
        """Return True if the plan is a control, or a plan of the space within the budget."""
        return self.control_of(plan) is not None or self.space.is_feasible(plan)


class LivesInDriver:
    """Keeps an object out of Tune's snapshot.

    The snapshot is never restored, and it cannot contain an open terminal.
    """

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


@dataclass(frozen=True)
class SearchOutcome:
    """The result of a search that is over."""

    trials: list[TrialRecord]  # in order of suggestion
    reused: list[TrialRecord]  # from searches with another budget or searcher
    ended: str  # the reason why no more trials were started
    seconds: float  # of all sessions
    sessions: int
    gpu_seconds: float


def plan_to_params(plan: PrecisionPlan) -> dict[str, str]:
    """Return the parameters of a plan in Tune: `format/GROUP` for each group."""
    # Interned to save memory, because Tune keeps the parameters of every trial to the end.
    return {sys.intern(f"format/{group}"): name for group, name in plan.as_dict().items()}


def params_to_plan(params: dict[str, Any]) -> PrecisionPlan:
    """Return the plan of a trial from its parameters in Tune."""
    formats = {
        key.removeprefix("format/"): name
        for key, name in params.items()
        if key.startswith("format/")
    }
    return PrecisionPlan.from_dict(formats, params["cut"])


def smaller_batch(record: TrialRecord, config: RunConfig) -> int | None:
    """Find the largest divisor of the batch size up to half of a trial's micro-batch.

    Return None if there is none, or if retries are off.
    """
    if not config.search.retry_out_of_memory:
        return None
    training = config.training
    present = record.micro_batch_size or training.micro_batch_size
    sizes = range(present // 2, 0, -1)
    return next((size for size in sizes if training.batch_size % size == 0), None)


def observations_of(record: TrialRecord, config: RunConfig) -> list[Observation]:
    """Return the score of a trial at every rung that it reached."""
    plan = plan_of(record)
    return [
        Observation(record.index, plan, rung.step, rung.cost(config.search.metric))
        for rung in record.rungs
    ]


def resume_search(job: SearchJob, proposer: Proposer) -> tuple[Ledger, list[TrialRecord]]:
    """Return a `Ledger` that knows all recorded trials, and the records of these trials.

    The searcher also learns from the trials of searches with another budget or searcher. Their
    plans are not run again and do not count towards `max_trials`.
    """
    ledger = Ledger(
        job.space,
        proposer,
        job.controls,
        job.config.search.max_trials,
        proposes=job.config.is_searched,
    )
    recorded = [_resumed(record, job) for record in read_trials(job.trials)]
    remove_old_checkpoints(job.trials, [record for record in recorded if record.is_over])
    for record in recorded:
        suggestion = Suggestion(plan_of(record), record.index, record.origin)
        ledger.recall(suggestion, observations_of(record, job.config), counts=job.owns(record))
        if job.owns(record) and not record.is_over:
            ledger.hand_out_again(suggestion)
        else:
            ledger.close(suggestion, record.plan_failed)
    return ledger, recorded


def _resumed(record: TrialRecord, job: SearchJob) -> TrialRecord:
    """Mark a trial as running if this search has to resume it, and return its record.

    A search resumes trials cut off or to be retried, and its controls that ASHA stopped in another
    search.
    """
    plan = plan_of(record)
    control = job.control_of(plan)
    cut_off = record.status == "running" or record.should_retry
    if not job.may_run(plan) or not (cut_off or (control and record.status == "stopped")):
        return record
    earlier_gpu_seconds = dict(record.earlier_gpu_seconds)
    if not job.owns(record):
        earlier_gpu_seconds[record.search] = record.gpu_seconds_of(record.search)
    update = {
        "search": job.search,
        "earlier_gpu_seconds": earlier_gpu_seconds,
        "origin": control or record.origin,
        "status": "running",
        "reason": None,
        "failure": None,
        "times": record.times[: 1 + len(record.rungs)],
    }
    resumed = record.model_copy(update=update)
    if resumed != record:
        write_trial(job.trials, resumed)
    return resumed
