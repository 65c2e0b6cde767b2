"""How often the report is right: searches are simulated, from the losses of their finalists to the
headline.

The noise is that of the fine-tunes in `benchmarks/record_rows.jsonl`. The functions that a run
calls choose the plans.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_records import made_finalist, made_fine_tune
from made_run import RIVAL, answers, results_of, score

from qpruner.report.claim import comparisons, finalist_differences, headline
from qpruner.runs.records import BEST_SEARCHED, CONFIRMATION, SEARCHED, Finalist, FineTune, Results
from qpruner.search.choice import contenders
from qpruner.search.roles import best_of, rival_of

ROWS = Path(__file__).parents[2] / "benchmarks" / "record_rows.jsonl"
CLOSE = 0.1  # nats between two plans that one might confuse
CONTROLS, SEARCHED_PLANS = ("unpruned-uniform", RIVAL), 4
FURTHER_SEED, JUDGING_SEEDS = 1001, (1, 2, 3)


@dataclass(frozen=True)
class Noise:
    """Standard deviations, in nats, of what shifts the difference of two plans: a seed, a row, one
    row of one seed."""

    seed: float
    row: float
    residual: float

    def draw(
        self, generator: np.random.Generator, num_plans: int, num_seeds: int, num_rows: int
    ) -> np.ndarray:
        """Return losses ``(plans, seeds, rows)`` of equal plans, each of which has half of a
        difference's variance."""
        shapes = [(self.seed, (num_plans, num_seeds, 1)), (self.row, (num_plans, 1, num_rows))]
        shapes.append((self.residual, (num_plans, num_seeds, num_rows)))
        of_all = generator.normal(2.4, 0.5, (1, 1, num_rows)) + generator.normal(
            0, 0.2, (1, num_seeds, 1)
        )
        losses: np.ndarray = of_all + sum(
            generator.normal(0, each / 2**0.5, shape) for each, shape in shapes
        )
        return losses


@pytest.fixture(scope="module")
def noise() -> Noise:
    """The mean variances over all pairs of recorded plans that differ by less than `CLOSE`."""
    by_plan: dict[str, list[list[float]]] = {}
    for line in ROWS.read_text().splitlines():
        recorded = json.loads(line)
        by_plan.setdefault(recorded["row"], []).append(recorded["losses"]["confirmation"])
    variances = []
    for one, other in itertools.combinations(
        [np.array(each) for each in by_plan.values() if len(each) == 3], 2
    ):
        less = one - other
        if 0 < abs(less.mean()) < CLOSE:
            of_rows, of_seeds = less.mean(axis=0), less.mean(axis=1)
            rest = less - of_rows - of_seeds[:, None] + less.mean()
            residual = (rest**2).sum() / (2 * (len(of_rows) - 1))
            found = (
                of_seeds.var(ddof=1) - residual / len(of_rows),
                of_rows.var(ddof=1) - residual / 3,
                residual,
            )
            variances.append(found)
    assert len(variances) > 50
    return Noise(*np.sqrt(np.mean(variances, axis=0)))


def simulated(
    noise: Noise,
    generator: np.random.Generator,
    effects: Sequence[float],
    num_choosing: int = 32,
    num_judging: int = 182,
    judging_seeds: Sequence[int] = JUDGING_SEEDS,
    is_compared: bool = True,
) -> Results:
    """Return a run in which plan i of the finalists, controls first, is worse than the base by
    effect i, in nats."""
    shifts = np.array(effects)[:, None, None]
    choosing = noise.draw(generator, len(effects), 2, num_choosing) + shifts
    found = [_finalist(at, {0: rows[0]}) for at, rows in enumerate(choosing)]
    rows = [each.losses[0] for each in found]
    again = contenders(
        [each.mean.loss for each in found], [each.control for each in found], 3, rows
    )
    for at in again if len(again) > 1 else ():
        found[at] = _finalist(at, {0: choosing[at][0], FURTHER_SEED: choosing[at][1]})
    winner = best_of(found, metric="loss")
    assert winner
    rival = rival_of(found, winner, metric="loss")
    assert rival
    judging = noise.draw(generator, len(effects), len(judging_seeds), num_judging) + shifts
    scored = _tuned(SEARCHED, winner, judging, judging_seeds)
    if is_compared:
        scored = (
            _tuned(rival.origin if rival.control else BEST_SEARCHED, rival, judging, judging_seeds)
            + scored
        )
    return results_of(scored, finalists=tuple(found), best_index=winner.index)


def _finalist(at: int, losses: dict[int, Any]) -> Finalist:
    origin = [*CONTROLS, *["gp"] * SEARCHED_PLANS][at]
    by_seed = {seed: tuple(rows.tolist()) for seed, rows in losses.items()}
    mean = float(np.mean(list(losses.values())))
    return made_finalist(at, origin, mean, losses=by_seed, plan=_plan(at))


def _plan(at: int) -> dict[str, str]:
    return {f"layers.{bit}": "int8" if at >> bit & 1 else "nf4" for bit in range(4)}


def _tuned(
    name: str, finalist: Finalist, losses: np.ndarray, seeds: Sequence[int]
) -> list[FineTune]:
    rows: list[FineTune] = []
    for seed, of_rows in zip(seeds, losses[finalist.index].tolist(), strict=True):
        tasks = [score(answers(4, 2))]
        rows.append(made_fine_tune(name, finalist.plan, seed, {CONFIRMATION: of_rows}, tasks))
    return rows


def share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


EQUAL = [0.0] * (len(CONTROLS) + SEARCHED_PLANS)


@pytest.mark.parametrize(
    ("num_rows", "seeds"),
    [
        (2, (1,)),
        (4, (1,)),
        (8, (1,)),
        (32, (1, 2)),
        (182, (1, 2, 3)),
        (91, range(1, 6)),
        (182, range(1, 11)),
    ],
)
def test_intervals_hold_the_true_difference_in_95_percent(
    noise: Noise, num_rows: int, seeds: Sequence[int]
) -> None:
    """With one seed they hold the difference under that seed, so this seed has no shift here."""
    generator, held = np.random.default_rng(num_rows), []
    known = Noise(0.0, noise.row, noise.residual) if len(seeds) == 1 else noise
    for _ in range(1000):
        effects = generator.normal(0, 0.05, len(EQUAL))
        results = simulated(known, generator, effects, num_judging=num_rows, judging_seeds=seeds)
        assert results.search and results.search.rival is not None
        true = effects[results.search.best_index] - effects[results.search.rival]
        [found] = [each for each in comparisons(results)[0].differences if each.verdict]
        assert found.half_width is not None
        held.append(abs(found.mean - true) < found.half_width)
    assert 0.93 <= share(held) <= 0.97


@pytest.mark.parametrize("is_compared", [True, False], ids=["rows that judge", "rows that chose"])
def test_of_equal_plans_none_is_called_better_or_worse(noise: Noise, is_compared: bool) -> None:
    """The winner is the luckiest of six, and so may be its rival among its kind."""
    generator = np.random.default_rng(1)
    runs = [
        simulated(noise, generator, EQUAL, num_judging=91, is_compared=is_compared)
        for _ in range(400)
    ]
    assert (
        share(
            [" better than " in headline(each) or " worse than " in headline(each) for each in runs]
        )
        <= 0.07
    )


def test_of_equal_finalists_none_is_called_worse(noise: Noise) -> None:
    """The table has six of them: with an interval of 95 % for each, in a third of all runs one
    seemed worse."""
    generator, called = np.random.default_rng(2), []
    for _ in range(400):
        search = simulated(noise, generator, EQUAL, num_judging=2, is_compared=False).search
        assert search
        called.append(
            any(
                difference and difference.verdict == "better"
                for difference in finalist_differences(search).values()
            )
        )
    assert share(called) <= 0.07


@pytest.mark.parametrize("better", [0, len(CONTROLS)], ids=["a control", "a searched plan"])
def test_a_difference_that_matters_is_called(noise: Noise, better: int) -> None:
    effects = list(EQUAL)
    effects[better] = -0.05
    generator, called = np.random.default_rng(3), []
    for _ in range(100):
        results = simulated(noise, generator, effects)
        called.append(" better than " in headline(results))
    assert share(called) >= 0.8


def test_the_headline_flatters_no_winner(noise: Noise) -> None:
    """Rows that chose the winner favour it; those that judge it favour nobody."""
    generator, said = np.random.default_rng(4), {True: list[float](), False: list[float]()}
    for is_compared, of_runs in said.items():
        for _ in range(400):
            results = simulated(
                noise, generator, EQUAL, num_choosing=16, num_judging=16, is_compared=is_compared
            )
            found = re.search(r"\(([-+][\d.]+) ± ", headline(results))
            assert found
            of_runs.append(float(found[1]))
    stderr = np.std(said[True]) / 400**0.5
    assert abs(np.mean(said[True])) < 3 * stderr
    assert np.mean(said[False]) < -3 * stderr, "so the headline names these rows"


def test_a_beaten_control_is_never_called_better(noise: Noise) -> None:
    """Two searched plans tie, so a further seed, which shifts all losses, is in their means and in
    no control's."""
    generator = np.random.default_rng(5)
    effects = [0.06, 0.08, 0.0, 0.0, 0.2, 0.2]
    runs = [
        simulated(noise, generator, effects, num_judging=2, is_compared=False) for _ in range(200)
    ]
    assert not any(" worse than " in headline(each) for each in runs)
