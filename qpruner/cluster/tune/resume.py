"""Resumes a search from the records: its own trials, and those of searches with another budget or searcher."""

from __future__ import annotations

from qpruner.cluster.tune.job import SearchJob, ending_of, observations_of
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.records import TrialRecord
from qpruner.search.searchers import Ledger, Proposer, Suggestion
from qpruner.search.trial_records import read_trials, remove_old_checkpoints, write_trial


def resume_search(job: SearchJob, proposer: Proposer) -> tuple[Ledger, list[TrialRecord]]:
    """Return a ledger of all recorded trials, and those trials.

    The searcher learns from another search's trials; their plans are not run again and do not count as `max_trials`.
    """
    settings = job.config.search
    ledger = Ledger(
        job.space,
        proposer,
        job.controls,
        settings.max_trials,
        None if settings.pareto else settings.patience,
        proposes=job.config.is_searched,
    )
    recorded = [_resumed(record, job) for record in read_trials(job.trials)]
    remove_old_checkpoints(job.trials, [record for record in recorded if record.is_over])
    for record in recorded:
        plan = PrecisionPlan.from_dict(record.plan)
        suggestion = Suggestion(record.index, record.origin, plan, record.expected_improvement, record.noise)
        rungs = observations_of(record, job.config)
        if not job.owns(record):
            ledger.recall(suggestion, rungs, ending_of(record), counts=False)
        elif record.status == "running":
            ledger.resume(suggestion, rungs)
        else:
            ledger.recall(suggestion, rungs, ending_of(record))
    return ledger, recorded


def _resumed(record: TrialRecord, job: SearchJob) -> TrialRecord:
    """Resume a trial that is not over: one that was cut off, or a control here that another search stopped."""
    plan = PrecisionPlan.from_dict(record.plan)
    control = job.control_of(plan)
    cut_off = record.status == "running" or record.should_retry
    if not job.space.is_feasible(plan) or not (cut_off or (control and record.status == "stopped")):
        return record
    earlier = record.earlier_gpu_seconds
    if not job.owns(record):
        earlier = earlier | {record.search: record.gpu_seconds_of(record.search)}
    update = {
        "search": job.search,
        "earlier_gpu_seconds": earlier,
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
