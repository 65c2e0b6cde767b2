"""What may be said of the searched plan beside others, from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.data.measures import accuracy_in_full
from qpruner.report.alone import told_alone
from qpruner.report.differences import (
    Difference,
    Pair,
    difference_text,
    more_bytes,
    over_confirmation_rows,
    over_questions,
    paired,
    seeds_text,
)
from qpruner.report.results import (
    BASE,
    BEST_SEED,
    PRUNED,
    RANDOM,
    SEARCHED,
    UNIFORM,
    Row,
    fine_tunes,
    rows,
    title_of,
    under_first_seed,
)
from qpruner.runs.records import GIVEN, CandidateRecord, Results, SearchRecord
from qpruner.search.random_plans import SAME_BYTES


@dataclass(frozen=True)
class Comparison:
    """The searched row against another one.

    Attributes:
        other: That row.
        origin: Where its plans came from; empty without such a row.
        seeds: Training seeds both have.
        more_bytes: Its bytes above the searched plan's, as a share of these, of the seed where they differ most.
        no_claim: Why nothing can be claimed; None where something can.
        differences: By measure; empty where nothing can be claimed.
    """

    other: str
    origin: str
    seeds: tuple[int, ...]
    more_bytes: float | None
    no_claim: str | None
    differences: tuple[Difference, ...]


def comparisons(results: Results) -> list[Comparison]:
    """The searched plan against the best seed and against random plans of equal bytes; empty without such rows."""
    if set(fine_tunes(results)) == {SEARCHED}:
        return []
    # One random plan does not show how far random plans lie apart.
    several = len({tuple(record.plan.items()) for record, _ in fine_tunes(results).get(RANDOM, ())}) > 1
    return [_compared(results, other) for other in (BEST_SEED, *([RANDOM] if several else []))]


def claim(results: Results) -> str:
    """What the searched plan lost against the base and the pruned model, and what can be said of it at equal bytes,
    never more than the spread allows: a line, then a list."""
    assert results.search
    found = comparisons(results)
    winner = _winner(results.search, fine_tunes(results)[SEARCHED][0][0])
    if not found:
        return told_alone(results, winner)
    lead = f"{winner}{_lost(results)}{_beside_uniform(results)}{_in_words(found)}"
    return "\n".join([lead, *map(_stated, found)])


def tally(found: Sequence[Comparison]) -> tuple[str, str]:
    """In how many of all comparisons the searched plan is better or worse, and how many these are: of several one may
    show a difference by chance."""
    verdicts = [difference.verdict for each in found for difference in each.differences]
    told = [f"{verdict} in {verdicts.count(verdict)}" for verdict in ("better", "worse") if verdict in verdicts]
    headline = f"{' and '.join(told)} of {len(verdicts)}" if told else "no difference shown"
    return headline, f"{len(verdicts)} comparisons, each at 95 % by itself"


def _winner(search: SearchRecord, winner: CandidateRecord) -> str:
    size, title = f"{winner.measured_bytes / 1e6:.2f} MB", title_of(SEARCHED, search)
    if search.control_won:
        return (
            f"No searched plan beat the best control on fresh rows: the control {search.best_origin} ({size}) is what "
            f"the search returned, in the row `{title}`."
        )
    return f"{title.capitalize()}: {winner.origin}, {size}."


def _compared(results: Results, other: str) -> Comparison:
    by_name = fine_tunes(results)
    pairs = paired(by_name[SEARCHED], by_name.get(other, ()))
    if not pairs:
        return Comparison(other, "", (), None, _without_seed(results.search), ())
    share, origin = more_bytes(pairs), pairs[0][1][0].origin
    seeds = tuple(dict.fromkeys(ours.seed for (ours, _), _ in pairs))
    reason = _why_no_claim(pairs, share)
    found = [] if reason else [*over_questions(pairs), over_confirmation_rows(pairs)]
    return Comparison(other, origin, seeds, share, reason, tuple(found))


def _why_no_claim(pairs: Sequence[Pair], share: float) -> str | None:
    if all(ours.plan == theirs.plan for (ours, _), (theirs, _) in pairs):
        return "it is the winner's plan itself, so there is no gain to claim"
    if abs(share) > SAME_BYTES:
        return f"no claim at equal bytes, it takes {abs(share):.1%} {'more' if share > 0 else 'fewer'}"
    return None


def _without_seed(search: SearchRecord | None) -> str:
    """Why there is no row of the best seed."""
    if search and search.best_origin == GIVEN:
        return "a plan was given, and no seed plan of this budget has finished in this folder"
    return "no seed plan was confirmed"


def _rival(found: Comparison) -> str:
    return "the best seed" if found.other == BEST_SEED else "random plans of equal bytes"


def beside_base(results: Results) -> tuple[list[Row], str]:
    """The searched row, then the base's and the pruned model's as far as there are such, all under the training seed
    that each had, and that seed in words; no words where no row had more."""
    alike = {row.name: row for row in under_first_seed(results)}
    found = [alike[name] for name in (SEARCHED, BASE, PRUNED) if name in alike]
    several = any(len(row.seeds) > 1 for row in rows(results))
    return found, f" under training seed {found[0].seeds[0]}" if several else ""


def _lost(results: Results) -> str:
    """What the winner weighs and knows beside the base and the pruned model, as a sentence; nothing without them."""
    three, under = beside_base(results)
    if len(three) < 3:
        return ""
    winner, base, _ = three
    assert results.evaluate
    told = f"test {accuracy_in_full(results.evaluate.metrics)}"
    told += " is {:.3f} (base {:.3f}, pruned {:.3f})".format(*(row.accuracy for row in three))
    losses = [row.answer_loss for row in three if row.answer_loss is not None]
    if len(losses) == len(three):
        told += " and its answer loss {:.3f} (base {:.3f}, pruned {:.3f})".format(*losses)
    return (
        f" At {winner.measured_bytes / base.measured_bytes:.1%} of the bytes of the base with such an adapter, its "
        f"{told}, all after the same fine-tune{under}."
    )


def _beside_uniform(results: Results) -> str:
    """What the winner weighs and knows beside uniform bits, as a sentence; nothing without such rows."""
    alike = {row.name: row for row in under_first_seed(results)}
    winner = alike[SEARCHED]
    uniform = [row for row in alike.values() if row.origin == UNIFORM and row.plans != winner.plans]
    if not uniform:
        return ""
    told = [f"{row.title} {row.confirmation_loss:.3f} at {row.measured_bytes / 1e6:.1f} MB" for row in uniform]
    return (
        f" Its confirmation loss is {winner.confirmation_loss:.3f} at {winner.measured_bytes / 1e6:.1f} MB "
        f"({', '.join(told)}), under the same training seed."
    )


def _in_words(found: Sequence[Comparison]) -> str:
    """The verdicts as a sentence, and how many they are; nothing where there are none."""
    parts = []
    for each in (each for each in found if each.differences):
        by_verdict = {
            verdict: " and ".join(one.measure for one in each.differences if one.verdict == verdict)
            for verdict in ("better", "worse")
        }
        told = [
            f"is {verdict} than {_rival(each)} in {measures}" for verdict, measures in by_verdict.items() if measures
        ]
        parts.append(" and ".join(told) or f"cannot be told from {_rival(each)}")
    if not parts:
        return ""
    headline, among = tally(found)
    return f" It {'; it '.join(parts)}. Over {among}: {headline}."


def _stated(found: Comparison) -> str:
    named = _rival(found)
    if found.more_bytes is None:
        return f"- Against {named}: no claim, {found.no_claim}."
    against = f"- Against {named} ({found.origin}, {found.more_bytes:+.2%} bytes)"
    if found.no_claim:
        return f"{against}: {found.no_claim}."
    return f"{against}, {seeds_text(found.seeds)}: {'; '.join(map(difference_text, found.differences))}."
