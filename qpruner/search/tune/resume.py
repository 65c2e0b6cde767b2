"""A search taken up from the records: its own trials, and those that another budget's or searcher's search left."""

from __future__ import annotations

from qpruner.plan import PrecisionPlan
from qpruner.records import TrialRecord
from qpruner.search.searchers import Ledger, Proposer, Suggestion
from qpruner.search.trial_records import read_trials, write_trial
from qpruner.search.tune.job import SearchJob, observations_of

DISK_FULL = "no space left on the disk"
"""Reason of a trial that says nothing of its plan, so it is tried again."""


def take_up(job: SearchJob, proposer: Proposer) -> tuple[Ledger, list[TrialRecord]]:
    """The ledger with every recorded trial in it, and those trials.

    Another search's trials inform the searcher, their plans are not run again, and they do not use up
    `search.max_trials`.
    """
    settings = job.config.search
    ledger = Ledger(job.space, proposer, job.controls, settings.max_trials, settings.patience)
    recorded = [_adopted(record, job) for record in read_trials(job.trials)]
    for record in recorded:
        plan = PrecisionPlan.from_dict(record.plan)
        suggestion = Suggestion(record.index, record.origin, plan, record.expected_improvement, record.noise)
        rungs = observations_of(record, job.config)
        if not job.owns(record):
            ledger.recall(suggestion, rungs, counts=False)
        elif _is_cut_off(record):
            ledger.resume(suggestion, rungs)
        else:
            ledger.recall(suggestion, rungs)
    return ledger, recorded


def _adopted(record: TrialRecord, job: SearchJob) -> TrialRecord:
    """Another search's trial, made this one's where it has to go on: it was cut off, or stopped early and is a control
    here. It counts among this search's trials from then on."""
    plan = PrecisionPlan.from_dict(record.plan)
    control = job.control_of(plan)
    goes_on = _is_cut_off(record) or (control is not None and record.status == "stopped")
    if job.owns(record) or not goes_on or not job.space.is_feasible(plan):
        return record
    update = {"search": job.search, "origin": control or record.origin, "status": "running", "reason": None}
    adopted = record.model_copy(update=update)
    write_trial(job.trials, adopted)
    return adopted


def _is_cut_off(record: TrialRecord) -> bool:
    return record.status == "running" or record.reason == DISK_FULL
