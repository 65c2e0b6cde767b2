"""Summarizes a search in sentences: what ran, why it ended, who won and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from qpruner.data.measures import Z_95, accuracy_in_full
from qpruner.report.search_progress import cost, score, score_name
from qpruner.report.statistics import paired_losses
from qpruner.runs.records import GIVEN, Confirmation, SearchRecord, TrialRecord
from qpruner.search.trial_records import REMEDIES
from qpruner.wording import counted, duration


def search_text(search: SearchRecord, trials: Sequence[TrialRecord]) -> list[str]:
    """Tell what ran and why it ended; then who was best on fresh rows, by how much."""
    return [_what_ran(search), _who_won(search, trials)]


def _what_ran(search: SearchRecord) -> str:
    by = "a given plan" if search.best_origin == GIVEN else search.searcher
    what = "loss" if search.metric == "loss" else accuracy_in_full(search.metrics)
    told = (
        f"{by} on {what}, budget {search.budget_bytes / 1e6:.1f} MB: "
        f"{counted(search.num_trials, 'trial')}, "
        f"{search.num_finished} finished, {search.num_stopped} stopped early, {search.num_failed} failed, in "
        f"{duration(search.total_seconds)}"
        + (f", {duration(search.total_gpu_seconds)} on GPUs" if search.total_gpu_seconds else "")
        + f". It ended because {search.ended}."
    )
    if search.num_reused:
        told += f" It started from {counted(search.num_reused, 'trial')} that earlier searches left."
    if search.sessions > 1:
        before = counted(search.resumed, "trial")
        told += f" Resumed: {search.sessions} sessions; the last began with {before} recorded before."
    if search.failures:
        failed = [f"{number} {kind} ({REMEDIES[kind]})" for kind, number in sorted(search.failures.items())]
        told += f" Failed: {', '.join(failed)}."
    return told


def _who_won(search: SearchRecord, trials: Sequence[TrialRecord]) -> str:
    if search.best_origin == GIVEN:
        controls = len(search.confirmations) - 1
        beside = f"scored on fresh rows beside {counted(controls, 'control')} that a search had tried"
        scored = beside if controls else "the only one scored on fresh rows"
        given = f"Trial {search.best_index} is the plan that was given, {scored}"
        return f"{given}; where this report speaks of a winner, it is meant."
    outcome = "a control: no searched plan beat it" if search.control_won else "a searched plan"
    best = f"On fresh rows trial {search.best_index} ({search.best_origin}) was best, {outcome}."
    apart = (f"I{clause[1:]}" for clause in margins(search))
    return " ".join([best, *apart, *_better_as_trial(search, trials)])


def margins(search: SearchRecord) -> Iterator[str]:
    """Yield by how much the winner beat the best of the other kind on fresh rows; nothing where there was none."""
    best, rival = rivals(search)
    if rival:
        ours, theirs = (score(each, search.metric) for each in (best, rival))
        is_behind = cost(best, search.metric) > cost(rival, search.metric)
        yield (
            f"its selection {score_name(search)} is {ours:.4f}, that of the best "
            f"{'searched plan' if search.control_won else 'control'} {theirs:.4f} (trial {rival.index}, "
            f"{rival.origin}): {'behind by' if is_behind else 'a margin of'} {abs(ours - theirs):.4f}"
            f"{margin_error(best, rival, search.metric)}."
        )


def rivals(search: SearchRecord) -> tuple[Confirmation, Confirmation | None]:
    """Return the winner on fresh rows, and the best of the other kind there: a control's is a searched plan."""
    best = next(each for each in search.confirmations if each.index == search.best_index)
    others = [each for each in search.confirmations if each.control != search.control_won and each != best]
    return best, min(others, key=lambda each: (cost(each, search.metric), each.index), default=None)


def margin_error(one: Confirmation, other: Confirmation, metric: str) -> str:
    """Describe the standard error of a margin: of its rows where they are known, else of each score."""
    apart = paired_losses(one, other) if metric == "loss" else None
    if apart:
        mean, paired = apart
        verdict = ", so it may be chance" if abs(mean) < Z_95 * paired else ""
        return f" (standard error {paired:.4f}, paired over {len(one.losses)} rows{verdict})"
    errors = [each.stderr if metric == "loss" else each.accuracy_stderr for each in (one, other)]
    known = [f"{error:.4f}" for error in errors if error is not None and not math.isnan(error)]
    over = "rows" if metric == "loss" else "questions"
    return f" (standard errors {' and '.join(known)}, over the same {over})" if len(known) == 2 else ""


def _better_as_trial(search: SearchRecord, trials: Sequence[TrialRecord]) -> Iterator[str]:
    """Yield which finalist scored better than the winner as a trial, and what fresh rows say of it."""
    fresh = {each.index: score(each, search.metric) for each in search.confirmations}
    finalists = {trial.index: trial.rungs[-1] for trial in trials if trial.index in fresh}
    winner = finalists.get(search.best_index)
    first = min(finalists, key=lambda index: (cost(finalists[index], search.metric), index), default=None)
    if winner and first is not None and cost(finalists[first], search.metric) < cost(winner, search.metric):
        yield (
            f"Trial {first} had the best score as a trial ({score(finalists[first], search.metric):.4f}, trial "
            f"{search.best_index} {score(winner, search.metric):.4f}), but {fresh[first]:.4f} on fresh rows."
        )
