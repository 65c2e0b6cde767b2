"""The final table and the claim under it, from records alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qpruner.records import CandidateRecord, Results, TaskScore, is_control

SEARCHED, SEED = "searched", "mutual-information seed"
Z_95 = 1.96
SAME_BYTES = 0.01
"""Plans whose bytes differ by less than this share count as equal bytes."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    plan: str
    num_parameters: int
    measured_bytes: int
    mean_bits: float
    peak_memory_bytes: int
    validation_loss: float
    accuracy: float
    accuracy_stderr: float


@dataclass(frozen=True)
class Comparison:
    """A paired difference, second less first, over the questions both answered.

    Attributes:
        difference: Mean difference.
        stderr: Its standard error.
        num_pairs: Questions.
    """

    difference: float
    stderr: float
    num_pairs: int

    @property
    def is_distinguishable(self) -> bool:
        """Whether the difference is outside its 95 % interval around zero."""
        return abs(self.difference) > Z_95 * self.stderr


def rows(results: Results) -> list[Row]:
    """The table's rows, in the order of the fine-tunes."""
    assert results.finetune and results.evaluate
    return [_row(record, results.evaluate.scores[record.name]) for record in results.finetune.candidates]


def claim(results: Results) -> str:
    """What can be said of the searched plan against the seed plan of equal bytes; never more than the spread allows."""
    assert results.finetune and results.evaluate and results.search
    by_name = {record.name: record for record in results.finetune.candidates}
    searched, seed = by_name[SEARCHED], by_name.get(SEED)
    if seed is None:
        return (
            "No claim: only the winner was fine-tuned (`finetune.compare` is off), so there is nothing of equal bytes "
            "to compare it with."
        )
    sizes = f"{searched.measured_bytes / 1e6:.2f} MB against {seed.measured_bytes / 1e6:.2f} MB"
    if searched.plan == seed.plan:
        return f"The search returned the mutual-information seed plan itself ({sizes}): there is no gain to claim."
    spent = searched.measured_bytes / seed.measured_bytes - 1
    if abs(spent) > SAME_BYTES:
        more_or_less = "more" if spent > 0 else "fewer"
        return (
            f"No claim at equal bytes: the searched plan takes {abs(spent):.1%} {more_or_less} bytes than the nearest "
            f"seed plan ({sizes}), so the two cannot be compared."
        )
    scores = results.evaluate.scores
    parts = [
        _part("accuracy", compare(scores[SEED], scores[SEARCHED], "correct"), "{:+.3f}", larger_is_better=True),
        _part("answer loss", compare(scores[SEED], scores[SEARCHED], "answer_loss"), "{:+.4f} nats", False),
    ]
    best = results.search.best_origin
    origin = f" (the winner is the control {best})" if is_control(best) else ""
    stated = "; ".join(part for part in parts if part) or "not distinguishable on a single question"
    return f"Searched{origin} against the mutual-information seed at equal bytes ({sizes}): {stated}."


def compare(first: tuple[TaskScore, ...], second: tuple[TaskScore, ...], value: str) -> Comparison | None:
    """Paired difference over every question of every task; None without such values or with one only."""
    differences: list[float] = []
    for one, other in zip(first, second, strict=True):
        left, right = getattr(one, value), getattr(other, value)
        if not left or not right:
            return None
        differences.extend(b - a for a, b in zip(left, right, strict=True))
    count = len(differences)
    if count < 2:
        return None  # one question has no spread
    mean = sum(differences) / count
    variance = sum((difference - mean) ** 2 for difference in differences) / max(count - 1, 1)
    return Comparison(mean, math.sqrt(variance / count), count)


def _part(name: str, found: Comparison | None, style: str, larger_is_better: bool) -> str | None:
    if found is None:
        return None
    figure = f"{name} {style.format(found.difference)} +- {found.stderr:.4f} ({found.num_pairs} questions, paired)"
    if not found.is_distinguishable:
        return f"{figure}, not distinguishable"
    better = (found.difference > 0) == larger_is_better
    return f"{figure}, {'better' if better else 'worse'} beyond the 95 % interval of this one training seed"


def _row(record: CandidateRecord, scores: tuple[TaskScore, ...]) -> Row:
    bar = "".join({4: "4", 8: "8", 16: "F"}[bits] for bits in record.plan.values())
    mean = sum(score.value for score in scores) / len(scores)
    stderr = math.sqrt(sum(score.stderr**2 for score in scores)) / len(scores)
    return Row(
        name=record.name,
        plan=bar,
        num_parameters=record.num_parameters,
        measured_bytes=record.measured_bytes,
        mean_bits=record.mean_bits,
        peak_memory_bytes=record.peak_memory_bytes,
        validation_loss=record.validation_loss,
        accuracy=mean,
        accuracy_stderr=stderr,
    )
