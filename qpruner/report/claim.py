"""Writes the claim: how the winner compares with others, as far as the measured spread allows a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.data.measures import accuracy_in_full, over_tasks
from qpruner.plans.plan import UNPRUNED
from qpruner.report.finalists import against_rival, best_control_text
from qpruner.report.results import BASE, PRUNED, RANDOM, SEARCHED, control_title, fine_tunes, rows, title_of
from qpruner.report.statistics import (
    SAME,
    Difference,
    differences_text,
    more_bytes,
    over_confirmation_rows,
    over_questions,
    paired,
    seeds_of,
)
from qpruner.runs.records import Results

VERDICTS = ("better", "worse")


@dataclass(frozen=True)
class Comparison:
    """The row `searched` of the final table compared with `other`, the best control in the budget or `random`.

    `origin` says what suggested the plan of `other`. `more_bytes` is how many bytes more `other` takes, as a share of
    the bytes of `searched`.
    """

    other: str
    origin: str
    seeds: tuple[int, ...]
    more_bytes: float
    differences: tuple[Difference, ...]


def comparisons(results: Results) -> list[Comparison]:
    """Compare the winner with the best control that users would try instead, then with random plans of equal bytes."""
    # The spread of random plans needs at least two of them.
    several = len({tuple(record.plan.items()) for record, _ in fine_tunes(results).get(RANDOM, ())}) > 1
    others = filter(None, (best_control(results), RANDOM if several else None))
    return [compared(results, other) for other in others]


def compared(results: Results, other: str) -> Comparison:
    """Compare the winner with another row of the final table, over the training seeds that both have."""
    by_name = fine_tunes(results)
    pairs = paired(by_name[SEARCHED], by_name[other])
    differences = (*over_questions(pairs), over_confirmation_rows(pairs))
    return Comparison(other, pairs[0][1][0].origin, seeds_of(pairs), more_bytes(pairs), differences)


def best_control(results: Results) -> str | None:
    """Name the control in the budget with most training seeds, then least validation loss: not what is claimed."""
    assert results.search
    by_name = fine_tunes(results)
    winner, budget = by_name[SEARCHED][0][0], results.search.budget_bytes
    may_not_win = {each.origin for each in results.search.confirmations if not each.fits}  # by bytes or multiply-adds
    order = {
        name: (-len(others), record.validation_loss)
        for name, [(record, _), *others] in by_name.items()
        if name not in (BASE, PRUNED, RANDOM, *may_not_win)
        and record.plan_bytes <= budget
        and (record.cut, record.plan) != (winner.cut, winner.plan)
    }
    return min(order, key=order.__getitem__, default=None)


def headline(results: Results) -> str:
    """Say how small the winner is, and how it compares with the best simple alternative, no surer than the spread."""
    assert results.search and results.prune
    winner, search = fine_tunes(results)[SEARCHED][0][0], results.search
    smaller = f"{results.prune.cuts[UNPRUNED].bytes_before / winner.measured_bytes:.1f} times smaller than the base"
    if search.control_won:
        return f"{smaller}. The simple thing is best here, and this is it: {control_title(search.best_origin)}"
    control, as_trial = best_control(results), against_rival(search)
    differences = compared(results, control).differences if control else as_trial[1:] if as_trial else ()
    if not differences:
        return f"{smaller}; compared with no simple alternative"
    counts, alternative = _counts(differences), "the best simple alternative"
    return f"{smaller}; " + (f"{counts} measures than {alternative}" if counts else f"{SAME} from {alternative}")


def claim(results: Results) -> str:
    """State how the winner compares with what users would do instead, with random plans, and with the base model.

    The first line is a paragraph. Each of the other lines states one fact behind the claim and begins with a dash.
    """
    assert results.search
    found, on_fresh_rows = comparisons(results), best_control_text(results.search)
    if found:
        verdict, items = _verdicts(found), [*map(_item, found), *filter(None, [on_fresh_rows])]
    else:
        verdict, items = on_fresh_rows, ["No other plan had this fine-tune, so nothing is claimed at equal bytes."]
    lead = " ".join(filter(None, [_winner(results), verdict, _against_base(results)]))
    return "\n- ".join([lead, *items])


def _winner(results: Results) -> str:
    assert results.search
    record, _ = fine_tunes(results)[SEARCHED][0]
    size, title = f"{record.measured_bytes / 1e6:.2f} MB", title_of(SEARCHED, results.search)
    if results.search.control_won:
        return (
            f"No searched plan beat the best control on fresh rows, so the search returned the control "
            f"{control_title(results.search.best_origin)} ({size}); its row is `{title}`."
        )
    return f"{title.capitalize()}: {record.origin}, {size}."


def _against_base(results: Results) -> str:
    """Compare the winner with the base, after the same fine-tune if it had one, else with the base as it is."""
    assert results.prune and results.evaluate
    by_name = {row.name: row for row in rows(results)}
    winner, base, how = by_name[SEARCHED], by_name.get(BASE), "after the same fine-tune"
    accuracies = [] if base is None else [base.accuracy]
    if base is None:
        untuned = [row for row in results.scores if row.name == BASE and row.seed is None]
        accuracies = [over_tasks([score.correct for score in row.scores]).mean for row in untuned]
        how = "without a fine-tune"
    base_bytes = results.prune.cuts[UNPRUNED].bytes_before
    beside = "".join(f" ({how} the base's is {each:.3f})" for each in accuracies)
    return (
        f"It is {base_bytes / winner.measured_bytes:.1f} times smaller than the base model. After its "
        f"fine-tune its confirmation loss is {winner.confirmation_loss:.4f} nats per token and its test "
        f"{accuracy_in_full(results.evaluate.metrics)} {winner.accuracy:.3f}{beside}."
    )


def _verdicts(found: Sequence[Comparison]) -> str:
    """Say in which measures the winner is better or worse, and in how many of all comparisons."""
    parts, total = [], sum(len(each.differences) for each in found)
    for each in found:
        measures = {word: [one.measure for one in each.differences if one.verdict == word] for word in VERDICTS}
        rival, named = _rival(each), {word: " and ".join(names) for word, names in measures.items() if names}
        phrases = [f"is {word} than {rival} in {names}" for word, names in named.items()]
        parts.append(" and ".join(phrases) or f"is {SAME} from {rival}")
    counts = _counts([one for each in found for one in each.differences]) or "no difference shown"
    return f"It {'; it '.join(parts)}. Over {total} comparisons, each at 95 % by itself: {counts}."


def _counts(differences: Sequence[Difference]) -> str:
    verdicts = [each.verdict for each in differences]
    counts = [f"{word} in {verdicts.count(word)}" for word in VERDICTS if word in verdicts]
    return f"{' and '.join(counts)} of {len(verdicts)}" if counts else ""


def _rival(found: Comparison) -> str:
    if found.other == RANDOM:
        return "random plans of equal bytes"
    return f"the best control in the budget ({control_title(found.other)})"


def _item(found: Comparison) -> str:
    against = f"Against {_rival(found)} ({found.origin}, {found.more_bytes:+.2%} bytes)"
    return f"{against}, {differences_text(found.seeds, found.differences)}."
