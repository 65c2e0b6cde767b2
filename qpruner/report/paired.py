"""Differences between two rows that were measured alike: by training seed, and by question or confirmation row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.records import FinalistScore
from qpruner.report.table import FineTune
from qpruner.wording import counted

Z_95 = 1.96
SAME = "not distinguishable"
ACCURACY, ANSWER_LOSS, CONFIRMATION_LOSS = "accuracy", "answer loss", "confirmation loss"
Pair = tuple[FineTune, FineTune]
"""One of the first row and one of the other, under the same training seed."""


@dataclass(frozen=True)
class Difference:
    """The searched row less another one in one measure, paired by training seed and by question or confirmation row.

    Attributes:
        measure: Accuracy (over all questions of all tasks), answer loss or confirmation loss.
        mean: Mean over training seeds.
        spread: Standard deviation over training seeds; None with one.
        half_width: Of the 95 % interval: the widest of Student's t over seeds and over the other row's plans (n - 1
            degrees of freedom, of their means) and the normal one over questions or rows; None where none can be told.
        num_pairs: Questions or confirmation rows; None where records of older versions do not have the rows.
        verdict: `better` or `worse` beyond the interval, else `not distinguishable`.
    """

    measure: str
    mean: float
    spread: float | None
    half_width: float | None
    num_pairs: int | None
    verdict: str


def paired(ours: Sequence[FineTune], theirs: Sequence[FineTune]) -> list[Pair]:
    """Every fine-tune of one row with every one of the other under the same training seed."""
    return [(one, other) for one in ours for other in theirs if one[0].seed == other[0].seed]


def more_bytes(pairs: Sequence[Pair]) -> float:
    """The other row's bytes above the first one's, as a share of these, of the pair that differs most."""
    sizes = [(ours.measured_bytes, theirs.measured_bytes) for (ours, _), (theirs, _) in pairs]
    return max(((theirs - ours) / ours for ours, theirs in sizes), key=abs)


def over_questions(pairs: Sequence[Pair]) -> list[Difference]:
    """The first row less the other one over every question of every task: accuracy, and the answer loss where every
    task has choices."""
    found = (_over_questions(ACCURACY, pairs, "correct"), _over_questions(ANSWER_LOSS, pairs, "answer_loss"))
    return [each for each in found if each]


def paired_losses(one: FinalistScore, other: FinalistScore) -> tuple[float, float] | None:
    """Mean and standard error of one finalist's losses less another's, row by row; None where records of older versions
    do not have the rows."""
    if not len(one.losses) == len(other.losses) > 1:
        return None
    apart = [ours - theirs for ours, theirs in zip(one.losses, other.losses, strict=True)]
    return statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart))


def over_confirmation_rows(pairs: Sequence[Pair]) -> Difference:
    """The first row less the other one in confirmation loss."""
    losses = [(ours.confirmation_loss, theirs.confirmation_loss) for (ours, _), (theirs, _) in pairs]
    both = [(ours.confirmation_losses, theirs.confirmation_losses) for (ours, _), (theirs, _) in pairs]
    by_pair = [[a - b for a, b in zip(*each, strict=True)] for each in both if all(each)]
    values = [ours - theirs for ours, theirs in losses]
    return _difference(CONFIRMATION_LOSS, pairs, values, by_pair if len(by_pair) == len(pairs) else [])


def told_difference(found: Difference) -> str:
    """A difference in words, with what it is sure of."""
    unit = "" if found.measure == ACCURACY else " nats"
    about = []
    if found.spread is not None:
        about.append(f"± {found.spread:.4f} over seeds")
    if found.num_pairs:
        about.append(counted(found.num_pairs, "row" if found.measure == CONFIRMATION_LOSS else "question"))
    low_high = "no interval"
    if found.half_width is not None:
        low_high = f"95 % interval {found.mean - found.half_width:+.4f} to {found.mean + found.half_width:+.4f}"
    return f"{found.measure} {found.mean:+.4f}{unit} ({', '.join([*about, low_high])}), {found.verdict}"


def told_seeds(seeds: Sequence[int]) -> str:
    """What the differences are over, in words."""
    return f"{len(seeds)} training seeds, paired" if len(seeds) > 1 else "one training seed, paired by question and row"


def _over_questions(measure: str, pairs: Sequence[Pair], value: str) -> Difference | None:
    """The difference over every question of every task; None where a task has no such values."""
    by_pair = []
    for (_, ours), (_, theirs) in pairs:
        tasks = zip(ours.scores, theirs.scores, strict=True)
        both = [(getattr(one, value), getattr(other, value)) for one, other in tasks]
        if not all(left and right for left, right in both):
            return None
        by_pair.append([a - b for left, right in both for a, b in zip(left, right, strict=True)])
    return _difference(measure, pairs, [statistics.fmean(values) for values in by_pair], by_pair)


def _difference(
    measure: str, pairs: Sequence[Pair], values: Sequence[float], by_pair: Sequence[Sequence[float]]
) -> Difference:
    """The difference whose pairs have these values, each over the same questions or rows, where those are known."""
    from scipy.stats import t

    by_seed = _means(values, [theirs.seed for _, (theirs, _) in pairs])
    by_plan = _means(values, [tuple(theirs.plan.values()) for _, (theirs, _) in pairs])
    widths = []
    for means in (by_seed, by_plan):
        if len(means) > 1:
            widths.append(float(t.ppf(0.975, len(means) - 1)) * statistics.stdev(means) / math.sqrt(len(means)))
    by_row = [statistics.fmean(each) for each in zip(*by_pair, strict=True)]
    if len(by_row) > 1:  # one question has no spread
        widths.append(Z_95 * statistics.stdev(by_row) / math.sqrt(len(by_row)))
    mean, half_width = statistics.fmean(values), max(widths, default=None)
    verdict = SAME
    # Seeds that agree to the last bit are no evidence of a spread of zero.
    if half_width and abs(mean) > half_width:
        verdict = "better" if (mean > 0) == (measure == ACCURACY) else "worse"
    spread = statistics.stdev(by_seed) if len(by_seed) > 1 else None
    return Difference(measure, mean, spread, half_width, len(by_row) or None, verdict)


def _means(values: Sequence[float], keys: Sequence[object]) -> list[float]:
    grouped: dict[object, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        grouped.setdefault(key, []).append(value)
    return [statistics.fmean(each) for each in grouped.values()]
