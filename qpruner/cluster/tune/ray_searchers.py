"""The searchers `hyperopt` and `bayesopt`: TPE and a Gaussian process through classes of Ray Tune.

Ray's classes accept scores only of plans that they have proposed themselves. So each proposal comes from a new object,
seeded from (seed, index). The known plans are its `points_to_evaluate`: it proposes these first and gets their scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray import tune

from qpruner.cluster.tune.job import METRIC
from qpruner.plans.plan import PlanSpace, PrecisionPlan
from qpruner.search.searchers import History, Observation, Proposal

INITIAL_RANDOM = 4
"""Random plans before the model is used; with Ray's defaults of 20 and 10, small searches would stay random."""


def _suggested(search: Any, known: Sequence[Observation]) -> dict[str, Any]:
    """Give the known scores to a searcher of Ray; return its next suggestion."""
    for item in known:
        search.suggest(f"known-{item.index}")
        search.on_trial_complete(f"known-{item.index}", {METRIC: item.score})
    suggested = search.suggest("new")
    assert isinstance(suggested, dict)
    return suggested


class HyperOptProposer:
    """TPE (Bergstra et al. 2011) through Ray's HyperOptSearch; 0.6 ms for each known plan of 30 groups."""

    name = "hyperopt"

    def __init__(self, space: PlanSpace, seed: int) -> None:
        from ray.tune.search.hyperopt import HyperOptSearch

        self._names, self._cut, self._seed, self._search = space.groups, space.cut, seed, HyperOptSearch
        offered = [[space.levels[at] for at in levels] for levels in space.offered]
        choices = {name: tune.choice(formats) for name, formats in zip(self._names, offered, strict=True)}
        self._search_space = HyperOptSearch.convert_search_space(choices)

    def propose(self, index: int, history: History) -> Proposal:
        """Propose a plan; the same arguments give the same plan."""
        known = history.last()
        search = self._search(
            self._search_space,
            metric=METRIC,
            mode="min",
            n_initial_points=INITIAL_RANDOM,
            points_to_evaluate=[each.plan.as_dict() for each in known] or None,
            random_state_seed=int(np.random.default_rng([self._seed, index]).integers(2**31)),
        )
        suggested = _suggested(search, known)
        return Proposal(PrecisionPlan.from_dict({name: suggested[name] for name in self._names}, self._cut))


class BayesOptProposer:
    """A Gaussian process with upper confidence bounds (Snoek et al. 2012) through Ray's BayesOptSearch.

    BayesOptSearch supports neither integers nor choices, so a group's format is a float that is rounded: its position
    among those offered. Groups without a choice are left out.
    """

    name = "bayesopt"

    def __init__(self, space: PlanSpace, seed: int) -> None:
        from ray.tune.search.bayesopt import BayesOptSearch

        self._space, self._seed, self._search = space, seed, BayesOptSearch
        self._offered = dict(zip(space.groups, space.offered, strict=True))
        self._bounds = {name: (0.0, len(levels) - 1.0) for name, levels in self._offered.items() if len(levels) > 1}

    def propose(self, index: int, history: History) -> Proposal:
        """Propose a plan; the same arguments give the same plan."""
        # A search with another budget may have scored the same plan, but BayesOptSearch accepts a point only once.
        scored = list({item.plan: item for item in history.last()}.values())
        known = scored if len(scored) >= INITIAL_RANDOM else []
        points = [dict(zip(self._space.groups, self._space.indices_of(item.plan), strict=True)) for item in known]
        search = self._search(
            self._bounds,
            metric=METRIC,
            mode="min",
            points_to_evaluate=[
                {name: float(self._offered[name].index(point[name])) for name in self._bounds} for point in points
            ],
            random_state=int(np.random.default_rng([self._seed, index]).integers(2**31)),
            random_search_steps=0,
            skip_duplicate=False,
            patience=len(known) + 2,
        )
        with warnings.catch_warnings():
            # sklearn warns whenever a length scale of its kernel ends at a bound.
            warnings.simplefilter("ignore")
            suggested = _suggested(search, known)
        return Proposal(
            self._space.plan_of(self._offered[name][round(suggested.get(name, 0))] for name in self._offered)
        )
