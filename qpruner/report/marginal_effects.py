"""What finished trials show of each group, to hold the sensitivities against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qpruner.runs.records import MethodScores, TrialRecord

TRIALS_PER_UNKNOWN = 1.5
"""With fewer trials an effect is mostly their noise."""
Effects = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class MarginalEffects:
    """Least-squares main effects of the plans on the loss.

    Attributes:
        values: Bits -> rise of the loss over the highest level, a group, in nats; for every lower level.
        num_trials: Finished trials that were fitted.
        residual: Standard deviation of what is left, in nats.
    """

    values: Effects
    num_trials: int
    residual: float


def marginal_effects(trials: Sequence[TrialRecord]) -> MarginalEffects | str:
    """Fit ``loss = constant + sum of an effect for each (group, bits)`` to the trials that finished.

    Args:
        trials: All of a search; their plans have the same groups.

    Returns:
        The effects, or why there are none: there must be `TRIALS_PER_UNKNOWN` finished trials for each and for
        the constant, with plans that tell them apart.
    """
    finished = [trial for trial in trials if trial.status == "finished"]
    if not finished:
        return "no trial finished"
    plans = np.array([list(trial.plan.values()) for trial in finished])
    *lower, highest = sorted(set(plans.ravel().tolist()))
    if not lower:
        return f"every finished trial has {highest} bits for every group"
    num_effects = plans.shape[1] * len(lower)
    num_unknowns = num_effects + 1
    num_needed = math.ceil(TRIALS_PER_UNKNOWN * num_unknowns)
    if len(finished) < num_needed:
        return (
            f"{num_effects} effects and a constant need {num_needed} finished trials, {TRIALS_PER_UNKNOWN:g} for each, "
            f"got {len(finished)}"
        )
    design = np.concatenate([np.ones((len(plans), 1)), *[plans == bits for bits in lower]], axis=1)
    losses = np.array([trial.rungs[-1].loss for trial in finished])
    solution, _, rank, _ = np.linalg.lstsq(design, losses, rcond=None)
    if rank < num_unknowns:
        return f"the plans of {len(finished)} finished trials do not tell {num_effects} effects apart"
    by_level = solution[1:].reshape(len(lower), -1)
    residual = float(np.sqrt(np.sum((losses - design @ solution) ** 2) / (len(finished) - num_unknowns)))
    values = {bits: tuple(map(float, row)) for bits, row in zip(lower, by_level, strict=True)}
    return MarginalEffects(values, len(finished), residual)


def rank_correlation(method: MethodScores, effects: MarginalEffects | str) -> float | None:
    """Spearman's rank correlation of a sensitivity with the effects, over all groups and lower levels; None where there
    are none, or one of the two is constant."""
    from scipy.stats import spearmanr

    if isinstance(effects, str):
        return None
    highest = np.array(method.values[max(method.values)])
    predicted = np.concatenate([np.array(method.values[bits]) - highest for bits in effects.values])
    shown = np.concatenate([np.array(row) for row in effects.values.values()])
    if np.ptp(predicted) == 0 or np.ptp(shown) == 0:
        return None
    return float(spearmanr(predicted, shown).statistic)
