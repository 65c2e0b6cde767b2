"""Writes the claim about how the winner compares with other plans.

The claim gives a verdict only where the measured spread allows one.
"""

from dataclasses import dataclass

from qpruner.data.measures import accuracy_name
from qpruner.plans.plan import UNPRUNED, plan_of
from qpruner.report.results import by_row
from qpruner.report.statistics import (
    CONFIRMATION_LOSS,
    SAME,
    SELECTION_LOSS,
    Difference,
    differences,
    differences_text,
    more_bytes,
    over_confirmation_rows,
    over_questions,
    paired,
    seeds_of,
    verdict_of,
)
from qpruner.runs.records import (
    BEST_SEARCHED,
    MERGED,
    RANDOM,
    SEARCHED,
    SELECTION,
    Finalist,
    Results,
    SearchRecord,
)
from qpruner.search.roles import compared_as_trials, control_title, rival_row
from qpruner.wording import counted

_MERGED = "fine-tuning in 16 bits, then quantizing"


@dataclass(frozen=True)
class RowComparison:
    """A comparison of the winner's row in the final table with the row `other`.

    `other` is the row of its rival, or `random`. `origin` says what suggested the plan of `other`.
    `more_bytes` is how many bytes more `other` takes, as a share of the winner's bytes.
    """

    other: str
    origin: str
    seeds: tuple[int, ...]
    more_bytes: float
    differences: tuple[Difference, ...]


def comparisons(results: Results) -> list[RowComparison]:
    """Compare the winner with its rival, the merged model, and random plans of equal bytes."""
    others = []
    rival = rival_row(results)
    if rival:
        others.append(rival)
    if MERGED in by_row(results):
        others.append(MERGED)
    random_plans = {plan_of(tuned) for tuned in by_row(results).get(RANDOM, ())}
    if len(random_plans) > 1:  # a single plan has no spread
        others.append(RANDOM)
    return [compared(results, other) for other in others]


def compared(results: Results, other: str) -> RowComparison:
    """Compare the winner with another row of the final table, over the training seeds of both.

    The verdict is by what the search minimized: the loss or, in a search by accuracy, the accuracy.
    """
    assert results.search and results.evaluate
    tuned = by_row(results)
    pairs = paired(tuned[SEARCHED], tuned[other])
    decisive = CONFIRMATION_LOSS
    if results.search.by_accuracy:
        decisive = accuracy_name(results.evaluate.metrics)
    measured = {**over_questions(pairs), **over_confirmation_rows(pairs)}
    return RowComparison(
        other=other,
        origin=tuned[other][0].origin,
        seeds=seeds_of(pairs),
        more_bytes=more_bytes(pairs),
        differences=differences(pairs, measured, decisive),
    )


def finalists(search: SearchRecord) -> list[Finalist]:
    """List the winner, then the others in the budget by their loss, then those that exceed it."""

    def key(finalist: Finalist) -> tuple[bool, bool, float, int]:
        is_other = finalist.index != search.best_index
        return is_other, not finalist.fits, finalist.as_trial.selection.loss, finalist.index

    return sorted(search.finalists, key=key)


def difference_from(finalist: Finalist, search: SearchRecord) -> Difference | None:
    """Subtract a finalist's loss from the winner's, as trials on the rows that chose the winner.

    Returns None for the winner itself. In a search by accuracy the loss gives no verdict.
    """
    if finalist.index == search.best_index:
        return None
    seeds, less = compared_as_trials(search.winner, finalist, len(search.finalists))
    return Difference(
        measure=SELECTION_LOSS,
        mean=less.mean,
        spread=None,
        half_width=less.half_width,
        num_pairs=len(finalist.as_trial.losses[SELECTION].by_row),
        seeds=seeds,
        verdict=None if search.by_accuracy else verdict_of(SELECTION_LOSS, less),
    )


def finalist_differences(search: SearchRecord) -> dict[int, Difference | None]:
    """Map the trial number of each of the `finalists` to `difference_from` it."""
    return {finalist.index: difference_from(finalist, search) for finalist in finalists(search)}


def headline(results: Results) -> str:
    """Say how small the winner is, and how it compares with its rival."""
    assert results.search and results.prune
    search = results.search
    winner = by_row(results)[SEARCHED][0]
    ratio = results.prune.cuts[UNPRUNED].bytes_before / winner.measured_bytes
    smaller = f"{ratio:.1f} times smaller than the base"
    if search.winner.control:
        smaller += f". A plan that needs no search won: {control_title(search.winner.origin)}"
    beside = f"{_beside_rival(results, search)}{_beside_merged(results)}"
    return f"{smaller}; {beside}{_lost(search)}"


def _beside_rival(results: Results, search: SearchRecord) -> str:
    """Compare the winner with its rival after their fine-tunes, or as trials if it had none."""
    rival = search.rival_as_trial
    if rival is None:
        return "compared with no other plan"
    which = "the best simple alternative" if rival.control else "the best searched plan"
    row = rival_row(results)
    if row is None and search.by_accuracy:
        name = accuracy_name(search.metrics)
        ours = f"{name} {search.winner.as_trial.accuracy:.3f} as a trial"
        theirs = f"that of {which} {rival.as_trial.accuracy:.3f}"
        return f"{ours}, {theirs}, on the questions that chose the winner"

    if row is None:
        decisive = difference_from(rival, search)
        where = ", both as trials on the rows that chose the winner"
    else:
        decisive = _decisive(results, row)
        where = ""
    assert decisive
    return _verdict_text(decisive, f"{which}{where}")


def _beside_merged(results: Results) -> str:
    """Compare the winner with the merged model after their fine-tunes, if there is one."""
    if MERGED not in by_row(results):
        return ""
    return f", and {_verdict_text(_decisive(results, MERGED), _MERGED)}"


def _decisive(results: Results, row: str) -> Difference:
    """Return the difference from a row of the final table that has the verdict."""
    return next(found for found in compared(results, row).differences if found.verdict)


def _verdict_text(difference: Difference, other: str) -> str:
    preposition = "from" if difference.verdict == SAME else "than"
    by = f" ({difference.short_text})" if difference.short_text else ""
    return f"{difference.verdict} {preposition} {other}{by}"


def _lost(search: SearchRecord) -> str:
    """Name the controls that were not measured: one of them may be better than the winner."""
    if not search.lost_controls:
        return ""
    titles = ", ".join(f"({control_title(name)})" for name in search.lost_controls)
    number = counted(len(search.lost_controls), "simple alternative")
    return f"; {number} without a result {titles}"


def claim(results: Results) -> str:
    """State the headline and, each on a line that begins with a dash, the comparisons behind it."""
    assert results.search
    items = [_item(comparison) for comparison in comparisons(results)]
    rival = results.search.rival_as_trial
    if not items:
        items = ["No other plan had this fine-tune, so nothing is claimed at equal bytes."]
        difference = difference_from(rival, results.search) if rival else None
        if rival and difference and difference.verdict:
            title = control_title(rival.origin)
            items.append(
                f"Against {title}, as trials on the rows that chose the winner: {difference.text}."
            )
    for name, reason in results.search.lost_controls.items():
        items.append(f"Without a result: {control_title(name)}, {reason}.")
    return "\n- ".join([f"{headline(results)}.", *items])


def _item(comparison: RowComparison) -> str:
    other = f"the best control in the budget ({control_title(comparison.other)})"
    if comparison.other == RANDOM:
        other = "random plans of equal bytes"
    elif comparison.other == BEST_SEARCHED:
        other = "the best searched plan"
    elif comparison.other == MERGED:
        other = _MERGED
    estimates = differences_text(comparison.seeds, comparison.differences)
    return (
        f"Against {other} ({comparison.origin}, {comparison.more_bytes:+.2%} bytes), {estimates}."
    )
