"""Measure how well the order of trials at a rung predicts their order at the last rung.

It is measured within cuts and across cuts. ASHA stops trials on the belief that it does. Two cuts
may recover from pruning at unlike speeds, so it has to be shown for them.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qpruner.runs.records import RungAgreement

AGREEMENT = 0.5
"""Kendall's tau from which on trials of unlike cuts are compared at a rung: three in four pairs are
in order."""
ENOUGH_PAIRS = 10
"""Pairs of finished trials of unlike cuts from which on `AGREEMENT` is believed: rungs that say
nothing about the last one reach it by chance in 51 % of cases with one pair, in 11 % with 2 x 5
trials, in 4 % with 5 x 5 (2026-11-30)."""


@dataclass
class Rungs:
    """The scores of trials at their rungs; lower is better."""

    cuts: Sequence[str]  # those whose plans are searched
    last: int  # the step of the last rung
    _cut_of: dict[int, str] = field(default_factory=dict)
    _scores: dict[int, dict[int, float]] = field(default_factory=dict)  # trial -> step -> score

    def add(self, trial: int, cut: str, step: int, score: float) -> None:
        """Add the score of a trial at a rung."""
        self._cut_of[trial] = cut
        self._scores.setdefault(trial, {})[step] = score

    def protects(self, trial: int, step: int) -> bool:
        """Return True if a trial must not be stopped at a rung.

        The best trial of each cut is protected until cuts can be compared. They can be once
        every cut has a trial at the last rung, if this rung puts `ENOUGH_PAIRS` of trials of unlike
        cuts in the order of the last one (`AGREEMENT`).
        """
        cut = self._cut_of[trial]
        score = self._scores[trial][step]
        rivals = (scores for index, scores in self._scores.items() if self._cut_of[index] == cut)
        if any(scores.get(step, score) < score for scores in rivals):
            return False
        trials = [(self._cut_of[index], scores) for index, scores in self._scores.items()]
        finished = [cut for cut, scores in trials if {step, self.last} <= scores.keys()]
        if not set(finished).issuperset(self.cuts):
            return True
        num_pairs = sum(one != other for one, other in itertools.combinations(finished, 2))
        if len(self.cuts) > 1 and num_pairs < ENOUGH_PAIRS:
            return True
        across = {rung.step: rung.across for rung in agreements(trials, self.last)}.get(step)
        return across is not None and across < AGREEMENT


def agreements(
    trials: Iterable[tuple[str, Mapping[int, float]]], last: int
) -> tuple[RungAgreement, ...]:
    """Compare the rungs of trials with the rung of step `last`.

    A trial is given by its cut and its scores by step.
    """
    finished = [(cut, scores) for cut, scores in trials if last in scores]
    steps = sorted({step for _, scores in finished for step in scores if step < last})
    agreements_by_step = []
    for step in steps:
        reached = [(cut, scores) for cut, scores in finished if step in scores]
        agreements_by_step.append(_agreement(step, reached, last))
    return tuple(agreements_by_step)


def _agreement(
    step: int, trials: Sequence[tuple[str, Mapping[int, float]]], last: int
) -> RungAgreement:
    cuts = np.array([cut for cut, _ in trials])
    early = np.array([scores[step] for _, scores in trials])
    late = np.array([scores[last] for _, scores in trials])
    ordered = np.sign(np.subtract.outer(early, early) * np.subtract.outer(late, late))
    is_pair = np.tri(len(trials), k=-1, dtype=bool)
    is_within = np.equal.outer(cuts, cuts)
    return RungAgreement(
        step=step,
        num_trials=len(trials),
        within=_mean(ordered[is_pair & is_within]),
        across=_mean(ordered[is_pair & ~is_within]),
    )


def _mean(signs: np.ndarray) -> float | None:
    return round(float(signs.mean()), 4) if signs.size else None
