"""Estimates the differences between rows of the final table, with 95 % intervals.

Models are paired by training seed, their scores by test question or by row of `data.confirmation`.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.data import measures
from qpruner.data.measures import Answers
from qpruner.report.results import FineTune
from qpruner.wording import counted

SAME = "not distinguishable"
ANSWER_LOSS, CONFIRMATION_LOSS, SELECTION_LOSS = "answer loss", "confirmation loss", "selection loss"
LOSSES = (ANSWER_LOSS, CONFIRMATION_LOSS, SELECTION_LOSS)
"""The measures in nats, for which lower is better; all other measures are accuracies."""
Pair = tuple[FineTune, FineTune]  # one fine-tune of each of two rows, with the same training seed


@dataclass(frozen=True)
class Difference:
    """How much one row of the final table exceeds another in a measure: `mean` ± `half_width`, a 95 % interval.

    `spread` is its standard deviation over training seeds, `num_pairs` counts questions or `data.confirmation` rows.
    `verdict` is `better` or `worse` if the interval excludes zero, else `not distinguishable`.
    """

    measure: str
    mean: float
    spread: float | None
    half_width: float | None
    num_pairs: int | None
    verdict: str

    @property
    def text(self) -> str:
        """The difference, its interval and the verdict in words."""
        unit = " nats" if self.measure in LOSSES else ""
        about = [] if self.spread is None else [f"± {self.spread:.4f} over seeds"]
        about += [counted(self.num_pairs, self.noun)] if self.num_pairs else []
        ends = "no interval"
        if self.half_width is not None:
            ends = f"95 % interval {self.mean - self.half_width:+.4f} to {self.mean + self.half_width:+.4f}"
        return f"{self.measure} {self.mean:+.4f}{unit} ({', '.join([*about, ends])}), {self.verdict}"

    @property
    def noun(self) -> str:
        """The unit of `num_pairs`: row or question."""
        return "row" if self.measure in (CONFIRMATION_LOSS, SELECTION_LOSS) else "question"

    @property
    def bar(self) -> tuple[float, float, float] | None:
        """Low end, mean and high end of the interval, as shares of its far end; those that are better are positive."""
        if not self.half_width:
            return None
        better, far = -self.mean if self.measure in LOSSES else self.mean, abs(self.mean) + self.half_width
        return (better - self.half_width) / far, better / far, (better + self.half_width) / far


def paired(ours: Sequence[FineTune], theirs: Sequence[FineTune]) -> list[Pair]:
    """Pair each fine-tune of one row with each fine-tune of the other that has the same training seed."""
    return [(one, other) for one in ours for other in theirs if one[0].seed == other[0].seed]


def seeds_of(pairs: Sequence[Pair]) -> tuple[int, ...]:
    """Return the training seeds of the pairs."""
    return tuple(dict.fromkeys(ours.seed for (ours, _), _ in pairs))


def more_bytes(pairs: Sequence[Pair]) -> float:
    """Return (second - first) / first of the models' bytes, in the pair with the largest absolute share."""
    sizes = [(ours.measured_bytes, theirs.measured_bytes) for (ours, _), (theirs, _) in pairs]
    return max(((theirs - ours) / ours for ours, theirs in sizes), key=abs)


def over_questions(pairs: Sequence[Pair]) -> list[Difference]:
    """Return first minus second model's accuracy and, if every task has choices, answer loss, paired by question."""
    (_, scored), _ = pairs[0]
    accuracy = measures.accuracy_name({score.task: score.metric for score in scored.scores})
    found = []
    for measure, values in ((accuracy, "correct"), (ANSWER_LOSS, "answer_loss")):
        by_pair = []
        for (_, ours), (_, theirs) in pairs:
            tasks = zip(ours.scores, theirs.scores, strict=True)
            by_pair.append([(getattr(one, values), getattr(other, values)) for one, other in tasks])
        if all(one and other for tasks in by_pair for one, other in tasks):
            less = [[_less(*both) for both in tasks] for tasks in by_pair]
            found.append(_difference(measure, pairs, [measures.over_tasks(tasks).mean for tasks in less], less))
    return found


def over_confirmation_rows(pairs: Sequence[Pair]) -> Difference:
    """Return first minus second model's confirmation loss, paired by row if the records have every row's loss."""
    values = [ours.confirmation_loss - theirs.confirmation_loss for (ours, _), (theirs, _) in pairs]
    both = [(ours.confirmation_losses, theirs.confirmation_losses) for (ours, _), (theirs, _) in pairs]
    by_pair = [[_less(ours, theirs)] for ours, theirs in both] if all(all(each) for each in both) else []
    return _difference(CONFIRMATION_LOSS, pairs, values, by_pair)


def differences_text(seeds: Sequence[int], differences: Sequence[Difference]) -> str:
    """Describe differences that are paired over these training seeds."""
    how = "one training seed (the intervals lack the spread over seeds), paired by question and row"
    if len(seeds) > 1:
        how = f"{len(seeds)} training seeds, paired"
    return f"{how}: {'; '.join(each.text for each in differences)}"


def _less(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def _difference(measure: str, pairs: Sequence[Pair], values: Sequence[float], by_pair: Sequence[Answers]) -> Difference:
    by_seed = _means(values, [theirs.seed for _, (theirs, _) in pairs])
    by_plan = _means(values, [tuple(theirs.plan.values()) for _, (theirs, _) in pairs])
    by_row = measures.averaged(by_pair)
    mean, half_width = statistics.fmean(values), _half_width(by_seed, by_plan, by_row)
    verdict = SAME
    # Equal values of all seeds or plans do not prove that the spread is zero.
    if half_width and abs(mean) > half_width:
        verdict = "better" if (mean < 0) == (measure in LOSSES) else "worse"
    spread = statistics.stdev(by_seed) if len(by_seed) > 1 else None
    return Difference(measure, mean, spread, half_width, sum(map(len, by_row)) or None, verdict)


def _half_width(by_seed: Sequence[float], by_plan: Sequence[float], by_row: Answers) -> float | None:
    """Return half of a difference's 95 % interval from its means by seed, plan and data row; None if these are too few.

    Against several random plans, use the prediction interval for one more random plan: the spread of their means over
    seeds includes the effects of plan, seeds and questions. Against one plan, use the wider of Student's interval over
    seeds and the normal one over questions or rows. Without several seeds it is too narrow, and too often excludes 0.
    """
    if len(by_plan) > 1:
        return measures.half_width(by_plan, of_next=True)
    widths = [measures.half_width(by_seed)] if len(by_seed) > 1 else []
    if by_row and not math.isnan(stderr := measures.over_tasks(by_row).stderr):
        widths.append(measures.Z_95 * stderr)
    return max(widths, default=None)


def _means(values: Sequence[float], keys: Sequence[object]) -> list[float]:
    grouped: dict[object, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        grouped.setdefault(key, []).append(value)
    return [statistics.fmean(each) for each in grouped.values()]
