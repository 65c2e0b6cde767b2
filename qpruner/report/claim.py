"""Writes the claim: how the winner compares with others, as far as the measured spread allows a
verdict."""

from dataclasses import dataclass

from qpruner.data.measures import accuracy_name
from qpruner.plans.plan import UNPRUNED
from qpruner.report.finalists import rival_as_trial
from qpruner.report.results import fine_tunes
from qpruner.report.statistics import (
    CONFIRMATION_LOSS,
    SAME,
    Difference,
    differences,
    differences_text,
    more_bytes,
    over_confirmation_rows,
    over_questions,
    paired,
    seeds_of,
)
from qpruner.runs.records import BEST_SEARCHED, RANDOM, SEARCHED, Results, SearchRecord
from qpruner.search.roles import control_title, rival_row
from qpruner.wording import counted


@dataclass(frozen=True)
class Comparison:
    """The row `searched` of the final table compared with `other`, the row of its rival or
    `random`.

    `origin` says what suggested the plan of `other`. `more_bytes` is how many bytes more `other`
    takes, as a share of the bytes of `searched`.
    """

    other: str
    origin: str
    seeds: tuple[int, ...]
    more_bytes: float
    differences: tuple[Difference, ...]


def comparisons(results: Results) -> list[Comparison]:
    """Compare the winner with its rival, then with random plans of equal bytes."""
    # The spread of random plans needs at least two of them.
    several = (
        len({tuple(record.plan.items()) for record, _ in fine_tunes(results).get(RANDOM, ())}) > 1
    )
    return [
        compared(results, other)
        for other in filter(None, (rival_row(results), RANDOM if several else None))
    ]


def compared(results: Results, other: str) -> Comparison:
    """Compare the winner with another row of the final table, over the training seeds that both
    have.

    The verdict is by what the search minimized: the loss or, in a search by accuracy, the accuracy.
    """
    assert results.search and results.evaluate
    by_name = fine_tunes(results)
    pairs = paired(by_name[SEARCHED], by_name[other])
    decisive = (
        accuracy_name(results.evaluate.metrics) if results.search.by_accuracy else CONFIRMATION_LOSS
    )
    found = differences(pairs, {**over_questions(pairs), **over_confirmation_rows(pairs)}, decisive)
    return Comparison(other, pairs[0][1][0].origin, seeds_of(pairs), more_bytes(pairs), found)


def headline(results: Results) -> str:
    """Say how small the winner is, and how it compares with its rival, no surer than the spread."""
    assert results.search and results.prune
    winner, search = fine_tunes(results)[SEARCHED][0][0], results.search
    smaller = f"{results.prune.cuts[UNPRUNED].bytes_before / winner.measured_bytes:.1f} times smaller than the base"
    if search.control_won:
        smaller = f"{smaller}. A plan that needs no search won: {control_title(search.best_origin)}"
    rival, row = rival_as_trial(search), rival_row(results)
    if rival is None or rival.difference is None:
        return f"{smaller}; compared with no other plan{_lost(search)}"
    which = "the best simple alternative" if rival.control else "the best searched plan"
    if row is None and search.by_accuracy:
        ours, theirs = search.winner.accuracy, search.finalist(rival.trial).accuracy
        name = accuracy_name(search.metrics)
        scores = f"{name} {ours:.3f} as a trial, that of {which} {theirs:.3f}, on the questions that chose the winner"
        return f"{smaller}; {scores}{_lost(search)}"
    found = compared(results, row).differences if row else (rival.difference,)
    decisive = next(each for each in found if each.verdict)
    than = f"{decisive.verdict} {'from' if decisive.verdict == SAME else 'than'}"
    where = "" if row else ", both as trials on the rows that chose the winner"
    by = f" ({decisive.short_text})" if decisive.short_text else ""
    return f"{smaller}; {than} {which}{where}{by}{_lost(search)}"


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
    items, rival = list(map(_item, comparisons(results))), rival_as_trial(results.search)
    if not items:
        items = ["No other plan had this fine-tune, so nothing is claimed at equal bytes."]
        if rival and rival.difference:
            items.append(
                f"Against {rival.title}, as trials on the rows that chose the winner: {rival.difference.text}."
            )
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
