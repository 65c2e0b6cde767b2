"""Estimates the differences between rows of the final table, with 95 % intervals.

Models are paired by training seed, their scores by test question or by row of `data.confirmation`.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qpruner.data import measures
from qpruner.data.measures import Answers, Interval, less
from qpruner.runs.records import RANDOM, FineTune
from qpruner.wording import counted

SAME = "not distinguishable"

ANSWER_LOSS = "answer loss"
CONFIRMATION_LOSS = "confirmation loss"
SELECTION_LOSS = "selection loss"
LOSSES = (ANSWER_LOSS, CONFIRMATION_LOSS, SELECTION_LOSS)
"""The measures in nats, for which lower is better; all other measures are accuracies."""

Pair = tuple[FineTune, FineTune]  # one fine-tune of each of two rows, with the same training seed
Measured = Mapping[str, Sequence[Answers]]
"""Measure -> for each pair of fine-tunes, for each task, how much the first exceeds the second on
each question."""


@dataclass(frozen=True)
class Difference:
    """How much one row of the final table exceeds another in a measure.

    It is `mean` ± `half_width`, a 95 % interval. `seeds` are the training seeds behind it; with one
    of them the interval holds for this seed alone. `spread` is the standard deviation over seeds,
    `num_pairs` counts questions or `data.confirmation` rows. `verdict` is `better` or `worse` if
    the interval excludes zero, else `not distinguishable`. Only the measure that decides has a
    verdict: with three of them, every seventh comparison of equal models would find a difference.
    """

    measure: str
    mean: float
    spread: float | None
    half_width: float | None
    num_pairs: int
    seeds: tuple[int, ...]
    verdict: str | None

    @property
    def text(self) -> str:
        """The difference, its interval and the verdict in words."""
        details = []
        if self.spread is not None:
            details.append(f"± {self.spread:.4f} over seeds")
        details.append(counted(self.num_pairs, self.noun))
        if self.half_width is None:
            details.append("no interval")
        else:
            low = self.mean - self.half_width
            high = self.mean + self.half_width
            details.append(f"95 % interval {low:+.4f} to {high:+.4f}{self.condition}")
        verdict = f", {self.verdict}" if self.verdict else ""
        return f"{self.measure} {self.mean:+.4f}{self.unit} ({', '.join(details)}){verdict}"

    @property
    def short_text(self) -> str:
        """The mean and half of the interval; empty if there is no interval."""
        if not self.half_width:
            return ""
        unit = self.unit or f" in {self.measure}"
        return f"{self.mean:+.3f} ± {self.half_width:.3f}{unit}{self.condition}"

    @property
    def unit(self) -> str:
        """The unit of the mean, with a space before it: nats, or nothing for accuracies."""
        return " nats" if self.measure in LOSSES else ""

    @property
    def condition(self) -> str:
        """The training seed that the interval holds for, if there is only one."""
        return f" under training seed {self.seeds[0]} alone" if len(self.seeds) == 1 else ""

    @property
    def noun(self) -> str:
        """What `num_pairs` counts: row or question."""
        return "row" if self.measure in (CONFIRMATION_LOSS, SELECTION_LOSS) else "question"

    @property
    def bar(self) -> tuple[float, float, float] | None:
        """Low end, mean and high end of the interval, as shares of the end that is further from 0.

        Positive values are better for the first model. It is None if there is no interval.
        """
        if not self.half_width:
            return None
        gain = -self.mean if self.measure in LOSSES else self.mean
        far_end = abs(gain) + self.half_width
        return (
            (gain - self.half_width) / far_end,
            gain / far_end,
            (gain + self.half_width) / far_end,
        )


def verdict_of(measure: str, difference: Interval) -> str:
    """Say whether the first model is better or worse, or cannot be distinguished."""
    if not difference.excludes_zero:
        return SAME
    return "better" if (difference.mean < 0) == (measure in LOSSES) else "worse"


def paired(ours: Sequence[FineTune], theirs: Sequence[FineTune]) -> list[Pair]:
    """Pair each fine-tune of one row with each one of the other that has the same training seed."""
    return [(one, other) for one in ours for other in theirs if one.seed == other.seed]


def seeds_of(pairs: Sequence[Pair]) -> tuple[int, ...]:
    """Return the training seeds of pairs of fine-tunes, each seed once."""
    return tuple(dict.fromkeys(ours.seed for ours, _ in pairs if ours.seed is not None))


def more_bytes(pairs: Sequence[Pair]) -> float:
    """Return how many bytes more the second model takes, as a share of the first one's bytes.

    If pairs differ, the share furthest from zero is returned.
    """
    shares = [theirs.measured_bytes / ours.measured_bytes - 1 for ours, theirs in pairs]
    return max(shares, key=abs)


def over_questions(pairs: Sequence[Pair]) -> Measured:
    """Return, for each question, the first model's accuracy minus the second's.

    If every task has choices, return the differences of the answer losses too.
    """
    accuracy = measures.accuracy_name({task.task: task.metric for task in pairs[0][0].tasks})
    tasks = [list(zip(ours.tasks, theirs.tasks, strict=True)) for ours, theirs in pairs]
    measured = {accuracy: [[less(a.correct, b.correct) for a, b in pair] for pair in tasks]}
    if all(a.answer_loss and b.answer_loss for pair in tasks for a, b in pair):
        measured[ANSWER_LOSS] = [
            [less(a.answer_loss, b.answer_loss) for a, b in pair] for pair in tasks
        ]
    return measured


def over_confirmation_rows(pairs: Sequence[Pair]) -> Measured:
    """Return, for each row of the confirmation data, the first model's loss minus the second's."""
    rows = [[less(ours.confirmation.by_row, theirs.confirmation.by_row)] for ours, theirs in pairs]
    return {CONFIRMATION_LOSS: rows}


def differences(pairs: Sequence[Pair], measured: Measured, decisive: str) -> tuple[Difference, ...]:
    """Estimate the mean difference in every measure; only the measure `decisive` gets a verdict.

    Against several random plans, the interval is where the difference from one more random plan
    would fall. It is computed from the spread between plans, each averaged over its seeds, so it
    covers the effects of plan, seeds and questions.
    """
    seeds = seeds_of(pairs)
    estimates = []
    for measure, by_pair in measured.items():
        means = [measures.over_tasks(tasks).mean for tasks in by_pair]
        by_seed = _means(means, [theirs.seed for _, theirs in pairs])
        if pairs[0][1].name == RANDOM:
            by_plan = _means(means, [tuple(theirs.plan.values()) for _, theirs in pairs])
            interval = measures.prediction_interval(by_plan)
        else:
            interval = measures.interval(by_pair)
        estimates.append(
            Difference(
                measure=measure,
                mean=interval.mean,
                spread=statistics.stdev(by_seed) if len(by_seed) > 1 else None,
                half_width=interval.half_width,
                num_pairs=sum(map(len, by_pair[0])),
                seeds=seeds,
                verdict=verdict_of(measure, interval) if measure == decisive else None,
            )
        )
    return tuple(estimates)


def differences_text(seeds: Sequence[int], estimates: Sequence[Difference]) -> str:
    """Describe differences that are paired over these training seeds."""
    texts = "; ".join(difference.text for difference in estimates)
    return f"{counted(len(seeds), 'training seed')}, paired: {texts}"


def _means(values: Sequence[float], keys: Sequence[object]) -> list[float]:
    """Average the values that have the same key."""
    grouped: dict[object, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        grouped.setdefault(key, []).append(value)
    return [statistics.fmean(group) for group in grouped.values()]
