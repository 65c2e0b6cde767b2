"""The searcher `bayesopt`: bayesian-optimization through Ray's BayesOptSearch."""

from __future__ import annotations

import warnings

import numpy as np
from ray.tune.search.bayesopt import BayesOptSearch

from qpruner.cluster.tune.job import METRIC
from qpruner.plans.plan import PlanSpace
from qpruner.search.searchers import History, Proposal


class BayesOptProposer:
    """A Gaussian process with upper confidence bounds (Snoek et al. 2012) through Ray's BayesOptSearch.

    It takes no whole numbers or choices, so a group's level is a float that is rounded. It stops at repetitions, so, as
    with `hyperopt`, each proposal is made by a fresh one, seeded from (seed, index), that evaluates every known plan.
    """

    name = "bayesopt"
    INITIAL_RANDOM = 4
    """Observations before anything is modelled, as for `hyperopt`; Ray's default is 10."""

    def __init__(self, space: PlanSpace, seed: int) -> None:
        self._space, self._seed = space, seed
        self._bounds = {name: (0.0, len(space.levels) - 1.0) for name in space.groups}

    def propose(self, index: int, history: History) -> Proposal:
        """Propose a plan; equal arguments give equal plans."""
        # Another budget's search may have run the same plan; a point may be given once.
        scored = list({item.plan: item for item in history.last()}.values())
        known = scored if len(scored) >= self.INITIAL_RANDOM else []
        search = BayesOptSearch(
            self._bounds,
            metric=METRIC,
            mode="min",
            points_to_evaluate=[
                dict(zip(self._space.groups, map(float, self._space.indices_of(item.plan)), strict=True))
                for item in known
            ],
            random_state=int(np.random.default_rng([self._seed, index]).integers(2**31)),
            random_search_steps=0,
            skip_duplicate=False,
            patience=len(known) + 2,
        )
        with warnings.catch_warnings():
            # sklearn says so whenever a length scale of its kernel ends at a bound.
            warnings.simplefilter("ignore")
            for item in known:
                search.suggest(f"known-{item.index}")
                search.on_trial_complete(f"known-{item.index}", {METRIC: item.score})
            suggested = search.suggest("new")
        assert isinstance(suggested, dict)
        return Proposal(self._space.plan_of(round(suggested[name]) for name in self._space.groups))
