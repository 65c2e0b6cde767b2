"""Which sensitivity the report shows first, and how far the best plan has the bits of its seed plan."""

from __future__ import annotations

from qpruner.report.marginal_effects import rank_correlation
from qpruner.report.results import MUTUAL_INFORMATION
from qpruner.report.search_progress import cost
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import Confirmation, TrialRecord
from qpruner.sensitivity.seeds import seed_origin

MOST_GROUPS = 8
"""Groups whose bits differ from a seed plan's that are named."""


def first_method(run: Snapshot) -> str:
    """The sensitivity whose seed plan was best on fresh rows. Where none was scored there, the one that agrees best
    with trials; where these show nothing, the first that tells of quantization errors."""
    assert run.sensitivity
    methods = run.sensitivity.methods
    best = _best_seed(run)
    if best:
        return next(name for name in methods if seed_origin(name) == best.origin)

    def rank(name: str) -> tuple[float, bool]:
        return rank_correlation(methods[name], run.effects) or 0.0, name != MUTUAL_INFORMATION

    return max(methods, key=rank)


def likeness(run: Snapshot) -> str | None:
    """How many groups of the best plan have the bits of the first method's seed plan, in a sentence; None where no
    trial had that plan under its name."""
    method, best, plan = first_method(run), _best_seed(run), run.best_plan
    seed = next((trial for trial in run.trials if _is_seed(run, trial, method, best)), None)
    if seed is None or plan is None:
        return None
    others = [
        f"{group} {bits} bits instead of {seed.plan[group]}" for group, bits in plan.items() if seed.plan[group] != bits
    ]
    alike, more = len(plan) - len(others), len(others) - MOST_GROUPS
    named = [*others[:MOST_GROUPS], *([f"{more} more"] if more > 0 else [])]
    which = f"trial {seed.index}" + (", the best seed on fresh rows" if best else "")
    told = f"; others: {', '.join(named)}" if named else ""
    return f"{alike} of {len(plan)} groups have the bits of the seed plan of {method} ({which}){told}."


def _best_seed(run: Snapshot) -> Confirmation | None:
    assert run.sensitivity
    origins = set(map(seed_origin, run.sensitivity.methods))
    confirmed = run.results.search.confirmations if run.results.search else ()
    seeds = [each for each in confirmed if each.control and each.origin in origins]
    return min(seeds, key=lambda each: (cost(each, run.metric), each.index), default=None)


def _is_seed(run: Snapshot, trial: TrialRecord, method: str, best: Confirmation | None) -> bool:
    if best:
        return trial.index == best.index
    return trial.origin == seed_origin(method) and trial in run.own_trials
