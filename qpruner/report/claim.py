"""Writes the claim: how the winner compares with others, as far as the measured spread allows a verdict."""

from dataclasses import dataclass

from qpruner.plans.plan import UNPRUNED
from qpruner.report.finalists import finalists, rival_as_trial
from qpruner.report.results import BASE, PRUNED, RANDOM, SEARCHED, control_title, fine_tunes
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
    return [compared(results, other) for other in filter(None, (best_control(results), RANDOM if several else None))]


def compared(results: Results, other: str) -> Comparison:
    """Compare the winner with another row of the final table, over the training seeds that both have."""
    by_name = fine_tunes(results)
    pairs = paired(by_name[SEARCHED], by_name[other])
    differences = (*over_questions(pairs), over_confirmation_rows(pairs))
    return Comparison(other, pairs[0][1][0].origin, seeds_of(pairs), more_bytes(pairs), differences)


def best_control(results: Results) -> str | None:
    """Name the control in the budget with most training seeds, then least confirmation loss: the hardest to beat."""
    assert results.search
    by_name = fine_tunes(results)
    winner, budget = by_name[SEARCHED][0][0], results.search.budget_bytes
    may_not_win = {each.origin for each in results.search.confirmations if not each.fits}  # by bytes or multiply-adds
    order = {
        name: (-len(others), record.confirmation_loss)
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
        own = next((each for each in finalists(search) if each.fits and not each.control), None)
        less = _in_nats(own.difference, " from the best of them") if own else ""
        return f"{smaller}. No searched plan beat this simple one: {control_title(search.best_origin)}{less}"
    control, rival = best_control(results), rival_as_trial(search)
    as_trial = (rival.difference,) if rival and rival.difference else ()
    differences = compared(results, control).differences if control else as_trial
    if not differences:
        return f"{smaller}; compared with no simple alternative"
    verdicts = [each.verdict for each in differences]
    counts = [f"{word} in {verdicts.count(word)}" for word in ("better", "worse") if word in verdicts]
    than = f"{' and '.join(counts)} of {len(verdicts)} measures than" if counts else f"{SAME} from"
    return f"{smaller}; {than} the best simple alternative{_in_nats(differences[-1])}"


def _in_nats(loss: Difference | None, other: str = "") -> str:
    return f" ({loss.mean:+.3f} ± {loss.half_width:.3f} nats{other})" if loss and loss.half_width else ""


def claim(results: Results) -> str:
    """State the headline and, each on a line that begins with a dash, the comparisons behind it."""
    assert results.search
    items, rival = list(map(_item, comparisons(results))), rival_as_trial(results.search)
    if not items:
        items = ["No other plan had this fine-tune, so nothing is claimed at equal bytes."]
        if rival and rival.difference:
            items.append(f"Against {rival.title}, as trials on fresh rows: {rival.difference.text}.")
    return "\n- ".join([f"{headline(results)}.", *items])


def _item(found: Comparison) -> str:
    control = f"the best control in the budget ({control_title(found.other)})"
    rival = "random plans of equal bytes" if found.other == RANDOM else control
    against = f"Against {rival} ({found.origin}, {found.more_bytes:+.2%} bytes)"
    return f"{against}, {differences_text(found.seeds, found.differences)}."
