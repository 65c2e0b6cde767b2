"""What trials show of each group: fitted where they can show it, refused with the numbers where they cannot."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qpruner.report.statistics import MarginalEffects, marginal_effects, rank_correlation
from qpruner.runs.records import MethodScores, RungResult, TrialRecord

LEVELS = (4, 8, 16)
TRUE = {4: np.array([0.3, 0.1, 0.5]), 8: np.array([0.02, 0.05, 0.01]), 16: np.zeros(3)}


def trial(index: int, bits: tuple[int, ...], loss: float, status: str = "finished") -> TrialRecord:
    return TrialRecord.model_validate(
        {
            "index": index,
            "digest": "",
            "search": "",
            "origin": "gp",
            "plan": {f"layers.{group}": level for group, level in enumerate(bits)},
            "plan_bytes": 1,
            "mean_bits": 8.0,
            "status": status,
            "rungs": (RungResult(step=1, loss=99.0), RungResult(step=2, loss=loss)),
        }
    )


def trials(count: int, noise: float = 0.0) -> list[TrialRecord]:
    plans = list(itertools.product(LEVELS, repeat=3))
    generator = np.random.default_rng(0)
    generator.shuffle(plans)
    return [
        trial(
            index, bits, 2.0 + sum(TRUE[level][group] for group, level in enumerate(bits)) + generator.normal(0, noise)
        )
        for index, bits in enumerate(plans[:count])
    ]


def test_additive_losses_give_their_effects_back() -> None:
    found = marginal_effects([*trials(14), trial(99, (4, 4, 4), 50.0, "stopped")])
    assert isinstance(found, MarginalEffects)
    assert set(found.values) == {4, 8} and found.num_trials == 14
    for bits, values in found.values.items():
        assert values == pytest.approx(TRUE[bits])
    assert found.residual == pytest.approx(0.0, abs=1e-9)


def test_the_residual_is_the_noise_of_a_trial() -> None:
    found = marginal_effects(trials(27, noise=0.01))
    assert isinstance(found, MarginalEffects)
    assert found.residual == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize("count", [1, 10])
def test_too_few_trials_are_counted_instead(count: int) -> None:
    assert marginal_effects([]) == "no trial finished"
    found = marginal_effects(trials(count))
    assert isinstance(found, str) and found.endswith(f"finished trials, 1.5 for each, got {count}")


@pytest.mark.parametrize("count", [1, 5])
def test_one_uniform_plan_alone_shows_no_effect(count: int) -> None:
    """A search may so far have finished its controls of one level only, or a given plan beside them."""
    found = marginal_effects([trial(index, (4, 4, 4), 2.0 + index) for index in range(count)])
    assert found == "every finished trial has 4 bits for every group"


def test_plans_that_always_go_together_are_not_told_apart() -> None:
    """Two groups that every plan gave the same bits have one effect between them."""
    together = [
        trial(index, (bits, bits, other), 2.0) for index, (bits, other) in enumerate([(4, 4), (4, 8), (8, 4), (8, 8)])
    ]
    found = marginal_effects(together * 2)
    assert found == "the plans of 8 finished trials do not tell 3 effects apart"


def test_a_sensitivity_is_ranked_against_the_effects() -> None:
    effects = marginal_effects(trials(20))

    def ranked(values: dict[int, tuple[float, ...]]) -> float | None:
        return rank_correlation(MethodScores(unit="", source="", values=values, seconds=0.0, details={}), effects)

    assert ranked({4: (3.0, 1.0, 5.0), 8: (0.2, 0.5, 0.1), 16: (0.0, 0.0, 0.0)}) == pytest.approx(1.0)
    assert ranked({4: (-3.0, -1.0, -5.0), 8: (-0.2, -0.5, -0.1), 16: (0.0, 0.0, 0.0)}) == pytest.approx(-1.0)
    assert ranked({4: (1.0, 1.0, 1.0), 8: (1.0, 1.0, 1.0), 16: (0.0, 0.0, 0.0)}) is None
    assert rank_correlation(MethodScores(unit="", source="", values={}, seconds=0.0, details={}), "too few") is None
