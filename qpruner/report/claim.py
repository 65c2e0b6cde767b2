"""Writes the claim about how the winner compares with others.

It goes as far as the measured spread allows a verdict.
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
    RANDOM,
    SEARCHED,
    SELECTION,
    Finalist,
    Results,
    SearchRecord,
)
from qpruner.search.roles import compared_as_trials, control_title, rival_row
from qpruner.wording import counted


@dataclass(frozen=True)
class Comparison:
    """The winner's row of the final table, `searched`, compared with the row `other`.

    `other` is the row of its rival, or `random`. `origin` says what suggested the plan of `other`.
    `more_bytes` is how many bytes more `other` takes, as a share of the bytes of `searched`.
    """

    other: str
    origin: str
    seeds: tuple[int, ...]
    more_bytes: float
    differences: tuple[Difference, ...]


def comparisons(results: Results) -> list[Comparison]:
    """Compare the winner with its rival, then with random plans of equal bytes."""
    # The spread of random plans needs at least two of them.
    random_plans = {plan_of(tuned) for tuned in by_row(results).get(RANDOM, ())}
    others = [rival_row(results), RANDOM if len(random_plans) > 1 else None]
    return [compared(results, other) for other in others if other]


def compared(results: Results, other: str) -> Comparison:
    """Compare the winner with another row of the final table, over the seeds that both have.

    These are training seeds. The verdict is by what the search minimized: the loss or, in a search
    by accuracy, the accuracy.
    """
    assert results.search and results.evaluate
    tuned = by_row(results)
    pairs = paired(tuned[SEARCHED], tuned[other])
    decisive = (
        accuracy_name(results.evaluate.metrics) if results.search.by_accuracy else CONFIRMATION_LOSS
    )
    measured = {**over_questions(pairs), **over_confirmation_rows(pairs)}
    return Comparison(
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
    """Return the winner's loss less that of another finalist, as trials on the rows that chose it.

    None for the winner itself. In a search by accuracy the loss decides nothing.
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
    """Map the trial of each finalist, in the order of `finalists`, to `difference_from` it."""
    return {each.index: difference_from(each, search) for each in finalists(search)}


def headline(results: Results) -> str:
    """Say how small the winner is, and how it compares with its rival, no surer than the spread."""
    assert results.search and results.prune
    search = results.search
    winner = by_row(results)[SEARCHED][0]
    ratio = results.prune.cuts[UNPRUNED].bytes_before / winner.measured_bytes
    smaller = f"{ratio:.1f} times smaller than the base"
    if search.control_won:
        smaller += f". A plan that needs no search won: {control_title(search.best_origin)}"
    return f"{smaller}; {_beside_rival(results, search)}{_lost(search)}"


def _beside_rival(results: Results, search: SearchRecord) -> str:
    """Compare the winner with its rival: after their fine-tunes or, without these, as trials."""
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
        decisive = next(each for each in compared(results, row).differences if each.verdict)
        where = ""
    assert decisive
    preposition = "from" if decisive.verdict == SAME else "than"
    by = f" ({decisive.short_text})" if decisive.short_text else ""
    return f"{decisive.verdict} {preposition} {which}{where}{by}"


def _lost(search: SearchRecord) -> str:
    """Name the controls that were not measured: one of them may be better than the winner."""
    lost = ", ".join(f"({control_title(name)})" for name in search.lost_controls)
    return (
        f"; {counted(len(search.lost_controls), 'simple alternative')} without a result {lost}"
        if lost
        else ""
    )


def claim(results: Results) -> str:
    """State the headline and, each on a line that begins with a dash, the comparisons behind it."""
    assert results.search
    items = [_item(comparison) for comparison in comparisons(results)]
    rival = results.search.rival_as_trial
    if not items:
        items = ["No other plan had this fine-tune, so nothing is claimed at equal bytes."]
        difference = rival and difference_from(rival, results.search)
        if rival and difference and difference.verdict:
            title = control_title(rival.origin)
            against = f"Against {title}, as trials on the rows that chose the winner"
            items.append(f"{against}: {difference.text}.")
    for name, reason in results.search.lost_controls.items():
        items.append(f"Without a result: {control_title(name)}, {reason}.")
    return "\n- ".join([f"{headline(results)}.", *items])


def _item(found: Comparison) -> str:
    if found.other in (RANDOM, BEST_SEARCHED):
        other = "random plans of equal bytes" if found.other == RANDOM else "the best searched plan"
    else:
        other = f"the best control in the budget ({control_title(found.other)})"
    against = f"Against {other} ({found.origin}, {found.more_bytes:+.2%} bytes)"
    return f"{against}, {differences_text(found.seeds, found.differences)}."
