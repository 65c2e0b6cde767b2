"""The searchers `hyperopt` and `bayesopt`: TPE and a Gaussian process through classes of Ray Tune.

Ray's classes accept scores only of plans that they have proposed themselves. So each proposal comes
from a new object, seeded from (seed, index). The known plans are its `points_to_evaluate`: it
proposes these first and gets their scores.
"""

import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from ray import tune

from qpruner.cluster.tune.job import METRIC
from qpruner.plans.plan import PrecisionPlan
from qpruner.plans.space import SearchSpace
from qpruner.search.searchers import History, Observation

INITIAL_RANDOM = 4
"""Random plans before the model is used.

With Ray's defaults of 20 and 10, small searches would stay random.
"""
Point = dict[str, int]
"""A plan as Ray knows it: for each group and the cut, a position among the choices there are."""


class _RayProposer(ABC):
    """Proposes plans by a class of Ray Tune."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._seed = seed
        self._offered = dict(zip(space.groups, space.offered, strict=True))
        self._offered["cut"] = tuple(range(len(space.cuts)))
        self._counts = {
            name: len(offered) for name, offered in self._offered.items() if len(offered) > 1
        }
        """The number of choices, where there is more than one."""

    @abstractmethod
    def _searcher(self, points: list[Point], seed: int) -> Any:
        """Make a searcher of Ray that proposes these points first."""

    def _told(self, history: History) -> list[Observation]:
        """Return the scores that Ray's searcher gets."""
        return history.last()

    def propose(self, index: int, history: History) -> PrecisionPlan:
        """Propose a plan; the same arguments give the same plan."""
        observations = self._told(history)
        seed = int(np.random.default_rng([self._seed, index]).integers(2**31))
        searcher = self._searcher([self._point(item.plan) for item in observations], seed)
        for item in observations:
            searcher.suggest(f"known-{item.index}")
            searcher.on_trial_complete(f"known-{item.index}", {METRIC: item.score})
        proposed = searcher.suggest("new")
        return self._space.plan_of(
            offered[round(proposed.get(name, 0))] for name, offered in self._offered.items()
        )

    def _point(self, plan: PrecisionPlan) -> Point:
        indices = dict(zip(self._offered, self._space.indices_of(plan), strict=True))
        return {name: self._offered[name].index(indices[name]) for name in self._counts}


class HyperOptProposer(_RayProposer):
    """The tree-structured Parzen estimator (Bergstra et al. 2011), by Ray's HyperOptSearch.

    A proposal takes 0.6 ms for each known plan of 30 groups.
    """

    name = "hyperopt"

    def _searcher(self, points: list[Point], seed: int) -> Any:
        from ray.tune.search.hyperopt import HyperOptSearch

        choices = {name: tune.choice(list(range(count))) for name, count in self._counts.items()}
        return HyperOptSearch(
            HyperOptSearch.convert_search_space(choices),
            metric=METRIC,
            mode="min",
            n_initial_points=INITIAL_RANDOM,
            points_to_evaluate=points or None,
            random_state_seed=seed,
        )


class BayesOptProposer(_RayProposer):
    """A Gaussian process with upper confidence bounds (Snoek et al. 2012), by Ray's BayesOptSearch.

    BayesOptSearch supports neither integers nor choices, so each position is a float that is
    rounded.
    """

    name = "bayesopt"

    def _told(self, history: History) -> list[Observation]:
        # A search with another budget may have scored the same plan, but BayesOptSearch accepts a
        # point only once.
        scored = list({item.plan: item for item in history.last()}.values())
        return scored if len(scored) >= INITIAL_RANDOM else []

    def propose(self, index: int, history: History) -> PrecisionPlan:
        """Propose a plan; the same arguments give the same plan."""
        with warnings.catch_warnings():
            # sklearn warns whenever a length scale of its kernel ends at a bound.
            warnings.simplefilter("ignore")
            return super().propose(index, history)

    def _searcher(self, points: list[Point], seed: int) -> Any:
        from ray.tune.search.bayesopt import BayesOptSearch

        return BayesOptSearch(
            {name: (0.0, count - 1.0) for name, count in self._counts.items()},
            metric=METRIC,
            mode="min",
            points_to_evaluate=[{name: float(at) for name, at in row.items()} for row in points],
            random_state=seed,
            random_search_steps=0,
            skip_duplicate=False,
            patience=len(points) + 2,
        )
