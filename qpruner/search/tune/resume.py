"""A search taken up from the records: its own trials, and those that another budget's or searcher's search left."""

from __future__ import annotations

from qpruner.plan import PrecisionPlan
from qpruner.records import TrialRecord
from qpruner.search.searchers import Ledger, Proposer, Suggestion
from qpruner.search.trial_records import read_trials, write_trial
from qpruner.search.tune.job import SearchJob, observations_of

DISK_FULL, DAMAGED = "no space left on the disk", "a file of the run is damaged"
"""How the reasons of trials begin that say nothing of their plans, so that they are tried again."""


def is_no_fault_of_the_plan(record: TrialRecord) -> bool:
    """Whether a trial failed for want of something that can be mended."""
    return record.reason is not None and record.reason.startswith((DISK_FULL, DAMAGED))


def take_up(job: SearchJob, proposer: Proposer) -> tuple[Ledger, list[TrialRecord]]:
    """The ledger with every recorded trial in it, and those trials.

    Another search's trials inform the searcher, their plans are not run again, and they do not use up
    `search.max_trials`.
    """
    settings = job.config.search
    proposes = settings.plan is None
    ledger = Ledger(job.space, proposer, job.controls, settings.max_trials, settings.patience, proposes)
    recorded = [_revived(record, job) for record in read_trials(job.trials)]
    for record in recorded:
        plan = PrecisionPlan.from_dict(record.plan)
        suggestion = Suggestion(record.index, record.origin, plan, record.expected_improvement, record.noise)
        rungs = observations_of(record, job.config)
        if not job.owns(record):
            ledger.recall(suggestion, rungs, counts=False)
        elif record.status == "running":
            ledger.resume(suggestion, rungs)
        else:
            ledger.recall(suggestion, rungs)
    return ledger, recorded


def _revived(record: TrialRecord, job: SearchJob) -> TrialRecord:
    """The record of a trial that has to go on, as one of this search: what was cut off, whosever it was, and what
    another search stopped early and is a control here."""
    plan = PrecisionPlan.from_dict(record.plan)
    control = job.control_of(plan)
    cut_off = record.status == "running" or is_no_fault_of_the_plan(record)
    if not job.space.is_feasible(plan) or not (cut_off or (control and record.status == "stopped")):
        return record
    update = {
        "search": job.search,
        "origin": control or record.origin,
        "status": "running",
        "reason": None,
        "times": record.times[: 1 + len(record.rungs)],
    }
    revived = record.model_copy(update=update)
    if revived != record:
        write_trial(job.trials, revived)
    return revived
