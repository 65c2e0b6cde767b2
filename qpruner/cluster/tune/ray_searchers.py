"""The searchers `hyperopt` and `bayesopt`: TPE and a Gaussian process through classes of Ray Tune.

Ray's classes accept scores only of plans that they have proposed themselves. So each proposal comes
from a new object, seeded from (seed, index). The known plans are its `points_to_evaluate`: it
proposes these first and gets their scores.
"""

import warnings
from collections.abc import Mapping, Sequence
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


class _Columns:
    """The groups and the cut as columns of a table of plans.

    A value is a position among the choices that its column offers.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._offered = dict(zip(space.groups, space.offered, strict=True))
        self._offered["cut"] = tuple(range(len(space.cuts)))
        self.counts = {
            name: len(offered) for name, offered in self._offered.items() if len(offered) > 1
        }
        """The number of values of each column that has a choice."""

    def values_of(self, plan: PrecisionPlan) -> dict[str, int]:
        indices = dict(zip(self._offered, self._space.indices_of(plan), strict=True))
        return {name: self._offered[name].index(indices[name]) for name in self.counts}

    def plan_of(self, values: Mapping[str, float]) -> PrecisionPlan:
        return self._space.plan_of(
            offered[round(values.get(name, 0))] for name, offered in self._offered.items()
        )


class _RayProposer:
    """Proposes each plan by a new object of one of Ray's classes."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._columns = _Columns(space)
        self._seed = seed

    def _seed_of(self, index: int) -> int:
        """Return the seed of the searcher that proposes the plan of a trial."""
        return int(np.random.default_rng([self._seed, index]).integers(2**31))

    def _suggested(self, search: Any, observations: Sequence[Observation]) -> PrecisionPlan:
        """Tell a searcher of Ray the known scores, and return its next suggestion."""
        for item in observations:
            search.suggest(f"known-{item.index}")
            search.on_trial_complete(f"known-{item.index}", {METRIC: item.score})
        return self._columns.plan_of(search.suggest("new"))


class HyperOptProposer(_RayProposer):
    """The tree-structured Parzen estimator (Bergstra et al. 2011), by Ray's HyperOptSearch.

    A proposal takes 0.6 ms for each known plan of 30 groups.
    """

    name = "hyperopt"

    def __init__(self, space: SearchSpace, seed: int) -> None:
        from ray.tune.search.hyperopt import HyperOptSearch

        super().__init__(space, seed)
        self._search = HyperOptSearch
        choices = {
            name: tune.choice(list(range(count))) for name, count in self._columns.counts.items()
        }
        self._search_space = HyperOptSearch.convert_search_space(choices)

    def propose(self, index: int, history: History) -> PrecisionPlan:
        """Propose a plan; the same arguments give the same plan."""
        observations = history.last()
        search = self._search(
            self._search_space,
            metric=METRIC,
            mode="min",
            n_initial_points=INITIAL_RANDOM,
            points_to_evaluate=[self._columns.values_of(item.plan) for item in observations]
            or None,
            random_state_seed=self._seed_of(index),
        )
        return self._suggested(search, observations)


class BayesOptProposer(_RayProposer):
    """A Gaussian process with upper confidence bounds (Snoek et al. 2012), by Ray's BayesOptSearch.

    BayesOptSearch supports neither integers nor choices, so each column of a plan is a float that
    is rounded.
    """

    name = "bayesopt"

    def __init__(self, space: SearchSpace, seed: int) -> None:
        from ray.tune.search.bayesopt import BayesOptSearch

        super().__init__(space, seed)
        self._search = BayesOptSearch
        self._bounds = {name: (0.0, count - 1.0) for name, count in self._columns.counts.items()}

    def propose(self, index: int, history: History) -> PrecisionPlan:
        """Propose a plan; the same arguments give the same plan."""
        # A search with another budget may have scored the same plan, but BayesOptSearch accepts a
        # point only once.
        scored = list({item.plan: item for item in history.last()}.values())
        observations = scored if len(scored) >= INITIAL_RANDOM else []
        points = []
        for item in observations:
            values = self._columns.values_of(item.plan)
            points.append({name: float(value) for name, value in values.items()})
        search = self._search(
            self._bounds,
            metric=METRIC,
            mode="min",
            points_to_evaluate=points,
            random_state=self._seed_of(index),
            random_search_steps=0,
            skip_duplicate=False,
            patience=len(observations) + 2,
        )
        with warnings.catch_warnings():
            # sklearn warns whenever a length scale of its kernel ends at a bound.
            warnings.simplefilter("ignore")
            return self._suggested(search, observations)
