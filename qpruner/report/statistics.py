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
ANSWER_LOSS, CONFIRMATION_LOSS, SELECTION_LOSS = (
    "answer loss",
    "confirmation loss",
    "selection loss",
)
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
        about = [] if self.spread is None else [f"± {self.spread:.4f} over seeds"]
        about.append(counted(self.num_pairs, self.noun))
        ends = "no interval"
        if self.half_width is not None:
            ends = (
                f"95 % interval {self.mean - self.half_width:+.4f} to "
                f"{self.mean + self.half_width:+.4f}"
            )
            ends += self.condition
        verdict = f", {self.verdict}" if self.verdict else ""
        return f"{self.measure} {self.mean:+.4f}{self.unit} ({', '.join([*about, ends])}){verdict}"

    @property
    def short_text(self) -> str:
        """The mean and half of the interval; empty without an interval."""
        if not self.half_width:
            return ""
        unit = self.unit or f" in {self.measure}"
        return f"{self.mean:+.3f} ± {self.half_width:.3f}{unit}{self.condition}"

    @property
    def unit(self) -> str:
        """The unit of the mean, after a space: nats; empty for accuracies."""
        return " nats" if self.measure in LOSSES else ""

    @property
    def condition(self) -> str:
        """What the interval is conditional on: a single training seed, if there is only one."""
        return f" under training seed {self.seeds[0]} alone" if len(self.seeds) == 1 else ""

    @property
    def noun(self) -> str:
        """The unit of `num_pairs`: row or question."""
        return "row" if self.measure in (CONFIRMATION_LOSS, SELECTION_LOSS) else "question"

    @property
    def bar(self) -> tuple[float, float, float] | None:
        """Low end, mean and high end of the interval, as shares of its far end.

        Those that are better are positive.
        """
        if not self.half_width:
            return None
        better, far = (
            -self.mean if self.measure in LOSSES else self.mean,
            abs(self.mean) + self.half_width,
        )
        return (better - self.half_width) / far, better / far, (better + self.half_width) / far


def verdict_of(measure: str, found: Interval) -> str:
    """Say whether the first model is better or worse than the second.

    It says so as far as the interval allows.
    """
    if not found.excludes_zero:
        return SAME
    return "better" if (found.mean < 0) == (measure in LOSSES) else "worse"


def paired(ours: Sequence[FineTune], theirs: Sequence[FineTune]) -> list[Pair]:
    """Pair each fine-tune of one row with each one of the other that has the same training seed."""
    return [(one, other) for one in ours for other in theirs if one.seed == other.seed]


def seeds_of(pairs: Sequence[Pair]) -> tuple[int, ...]:
    """Return the training seeds of the pairs."""
    return tuple(dict.fromkeys(ours.seed for ours, _ in pairs if ours.seed is not None))


def more_bytes(pairs: Sequence[Pair]) -> float:
    """Return (second - first) / first of the models' bytes.

    It is that of the pair with the largest absolute share.
    """
    shares = [theirs.measured_bytes / ours.measured_bytes - 1 for ours, theirs in pairs]
    return max(shares, key=abs)


def over_questions(pairs: Sequence[Pair]) -> Measured:
    """Return the first minus the second model's accuracies, by question.

    If every task has choices, the differences of the answer losses are returned too.
    """
    accuracy = measures.accuracy_name({task.task: task.metric for task in pairs[0][0].tasks})
    tasks = [list(zip(ours.tasks, theirs.tasks, strict=True)) for ours, theirs in pairs]
    measured = {
        accuracy: [[less(one.correct, other.correct) for one, other in both] for both in tasks]
    }
    if all(one.answer_loss and other.answer_loss for both in tasks for one, other in both):
        measured[ANSWER_LOSS] = [
            [less(one.answer_loss, other.answer_loss) for one, other in both] for both in tasks
        ]
    return measured


def over_confirmation_rows(pairs: Sequence[Pair]) -> Measured:
    """Return first minus second model's confirmation losses by row."""
    rows = [[less(ours.confirmation.by_row, theirs.confirmation.by_row)] for ours, theirs in pairs]
    return {CONFIRMATION_LOSS: rows}


def differences(pairs: Sequence[Pair], measured: Measured, decisive: str) -> tuple[Difference, ...]:
    """Estimate the mean difference in every measure; the measure `decisive` gives the verdict.

    Against several random plans, the interval is that of one more random plan: the spread of their
    means over seeds includes the effects of plan, seeds and questions.
    """
    seeds = seeds_of(pairs)
    found = []
    for measure, by_pair in measured.items():
        means = [measures.over_tasks(tasks).mean for tasks in by_pair]
        by_seed = _means(means, [theirs.seed for _, theirs in pairs])
        if pairs[0][1].name == RANDOM:
            by_plan = _means(means, [tuple(theirs.plan.values()) for _, theirs in pairs])
            interval = measures.prediction_interval(by_plan)
        else:
            interval = measures.interval(by_pair)
        found.append(
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
    return tuple(found)


def differences_text(seeds: Sequence[int], found: Sequence[Difference]) -> str:
    """Describe differences that are paired over these training seeds."""
    return (
        f"{counted(len(seeds), 'training seed')}, paired: {'; '.join(each.text for each in found)}"
    )


def _means(values: Sequence[float], keys: Sequence[object]) -> list[float]:
    grouped: dict[object, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        grouped.setdefault(key, []).append(value)
    return [statistics.fmean(each) for each in grouped.values()]
