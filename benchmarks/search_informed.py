"""What a surrogate of two levels gives up to one who knows what no search can: how its effects spread, and the noise.

An additive model whose effects have a Gaussian prior. Its mean is the true best combination of bytes and, seeded, of
the sensitivities; its variance is that of the true effects around it. How far this comes in so many trials says which
goals are out of reach on a table, whatever the searcher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from search_replay import Replay, Table, Task, replay
from search_results import FRACTIONS, Row, quartiles, summarize

from qpruner.plans.plan import PrecisionPlan
from qpruner.plans.space import PlanSpace
from qpruner.search.searchers import History, Proposal

SEEDS = 12
RANDOM_PLANS = (32, 64, 128, 256)
RESTLESSNESS = (0.0, 0.5, 1.0)
"""Of a draw from the posterior that plans are chosen by, in standard deviations: 0 is the mean, 1 Thompson sampling."""


@dataclass(frozen=True)
class Informed:
    """A proposer that knows the prior.

    Attributes:
        table: The surrogate.
        space: Its plans.
        seed: Seeds the draws.
        seeded: Whether the prior's mean is told by the sensitivities, too.
        restlessness: As in `RESTLESSNESS`.
    """

    table: Table
    space: PlanSpace
    seed: int
    seeded: bool
    restlessness: float = 0.0
    name: str = "informed"

    @cached_property
    def effects(self) -> np.ndarray:
        """What each group's higher level adds to the loss, ``(groups,)``."""
        low, high = (np.array(self.table.content["main"][level]) for level in self.table.levels)
        return np.asarray(high - low)

    @cached_property
    def noise(self) -> float:
        return float(self.table.content["loss_noise"])

    @cached_property
    def mean(self) -> np.ndarray:
        low, high = self.table.levels
        told = [np.diff(np.array(self.space.group_bytes), axis=1)[:, 0]]
        if self.seeded:
            told += [np.array(values[high]) - np.array(values[low]) for values in self.table.sensitivities.values()]
        columns = np.stack([column / np.abs(column).mean() for column in told], axis=1)
        return np.asarray(columns @ np.linalg.lstsq(columns, self.effects, rcond=None)[0])

    @cached_property
    def variance(self) -> float:
        return float(np.mean((self.effects - self.mean) ** 2))

    def posterior(self, plans: Sequence[PrecisionPlan], scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean ``(groups,)`` and covariance ``(groups, groups)`` of the effects; the level of all scores is unknown."""
        design = (np.array([plan.formats for plan in plans]) == self.table.levels[1]).astype(float)
        design, centred = design - design.mean(0), scores - scores.mean()
        solve = np.linalg.inv(self.variance * design @ design.T + self.noise**2 * np.eye(len(plans)))
        gain = self.variance * design.T @ solve
        found = self.mean + gain @ (centred - design @ self.mean)
        return found, self.variance * (np.eye(len(self.mean)) - gain @ design)

    def propose(self, index: int, history: History) -> Proposal:
        generator = np.random.default_rng([self.seed, index])
        seen = history.last()
        known = {item.plan for item in seen}
        mean, spread = self.mean, np.zeros((len(self.mean),) * 2)
        if seen:
            mean, covariance = self.posterior([item.plan for item in seen], np.array([item.score for item in seen]))
            spread = np.linalg.cholesky(covariance + 1e-12 * np.eye(len(mean)))
        plan = best_plan(self.space, mean + self.restlessness * spread @ generator.standard_normal(len(mean)))
        for wider in (1.0, 1.0, 1.0, 2.0, 4.0):  # the mean's best has run
            if plan not in known:
                break
            plan = best_plan(self.space, mean + wider * spread @ generator.standard_normal(len(mean)))
        return Proposal(plan)


def best_plan(space: PlanSpace, effects: np.ndarray) -> PrecisionPlan:
    """The plan of two levels that loses least by effects that add up."""
    return space.best_by_gain([[0.0, -effect] for effect in effects])


def informed_searches(task: Task) -> dict[float, Row]:
    """Searches as `task`, one at a time, by restlessness."""
    table = Table.read(task.path)
    space = table.space(task.fraction)
    found: dict[float, list[Replay]] = {}
    for restlessness in RESTLESSNESS:
        for seed in range(SEEDS):
            proposer = Informed(table, space, seed, task.seeded, restlessness)
            named = Task(task.path, task.fraction, proposer.name, task.seeded, 1, seed)
            found.setdefault(restlessness, []).append(replay(named, proposer=proposer))
    return {restlessness: summarize(replays)[0] for restlessness, replays in found.items()}


def random_design(table: Table) -> dict[int, tuple[float, ...]]:
    """What random plans can tell at the middle budget: their number -> quartiles of the regret of the plan that the
    blind posterior's mean picks."""
    space = table.space(FRACTIONS[0])
    best, worst = table.limits(space)
    sizes = np.diff(np.array(space.group_bytes), axis=1)[:, 0]
    room = space.budget_bytes - space.fixed_bytes - sum(group[0] for group in space.group_bytes)

    def regret(number: int, seed: int) -> float:
        generator = np.random.default_rng(seed)
        informed = Informed(table, space, seed, seeded=False)
        design = np.zeros((number, len(sizes)))
        for row in design:
            for group in generator.permutation(len(sizes)):
                row[group] = row @ sizes + sizes[group] <= room
        scores = design @ informed.effects + informed.noise * generator.standard_normal(number)
        plans = [space.plan_of(row) for row in design]
        plan = best_plan(space, informed.posterior(plans, scores)[0])
        return (table.score(plan.formats, 0) - best) / (worst - best)

    return {number: quartiles([regret(number, seed) for seed in range(SEEDS)]) for number in RANDOM_PLANS}
