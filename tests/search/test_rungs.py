"""How well a rung orders trials, within and across cuts."""

import numpy as np
import pytest
from conftest import assert_has
from scipy import stats

from qpruner.search.rungs import ENOUGH_PAIRS, Rungs, agreements


def test_the_agreement_is_kendalls_tau_over_pairs() -> None:
    generator = np.random.default_rng(0)
    early, late = generator.normal(size=(2, 20))
    trials = [("base", {1: one, 2: other}) for one, other in zip(early, late, strict=True)]
    [found] = agreements([*trials, ("base", {1: 0.0})], last=2)
    assert_has(
        found,
        step=1,
        num_trials=20,
        across=None,
        within=pytest.approx(stats.kendalltau(early, late).statistic, abs=1e-4),
    )


def test_a_cut_that_recovers_late_disagrees_across_only() -> None:
    """Each cut is ordered rightly from the first rung on; the pruned one is behind there, and ahead
    at the end."""
    base = [("base", {1: 1.0 + at, 2: 10.0 + at, 4: 20.0 + at}) for at in range(4)]
    pruned = [("cut-20", {1: 9.0 + at, 2: 7.0 + at, 4: 9.0 + at}) for at in range(4)]
    first, second = agreements([*base, *pruned], last=4)
    assert_has(first, within=1.0, across=-1.0)
    # One of the 16 pairs is a tie.
    assert_has(second, within=1.0, across=15 / 16)
    assert agreements([], last=4) == ()


@pytest.mark.parametrize("recovers", [False, True])
def test_the_best_of_a_cut_is_protected_until_enough_pairs_agree(recovers: bool) -> None:
    rungs = Rungs(("base", "cut-20"), last=2)
    for trial, cut in enumerate(["base", "cut-20"] * 3 + ["base"]):
        if trial == 6:
            assert 3 * 3 < ENOUGH_PAIRS <= 4 * 3
            assert rungs.protects(1, 1)
            assert not rungs.protects(3, 1)
        rungs.add(trial, cut, 1, float(trial))
        rungs.add(trial, cut, 2, trial - 10.0 * (recovers and cut == "cut-20"))
    assert rungs.protects(1, 1) == recovers
