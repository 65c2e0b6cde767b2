"""The searcher `gp`: Bayesian optimization of plans under a byte budget.

It proposes the new plan inside the budget with the largest log expected improvement (Ament et al.,
arXiv 2310.20708) under the model in `plan_model`. In a small space every plan is a candidate. In a
large one the candidates are the best plans of every cut for sampled effects of levels, plans that
improve on those, and neighbours of the best known plans and of the best candidates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from botorch.acquisition.analytic import _log_ei_helper
from torch import Tensor

from qpruner.plans.plan import PrecisionPlan
from qpruner.plans.space import SearchSpace, indices_offered
from qpruner.search.plan_model import Data, PlanModel, informative
from qpruner.search.posterior import Posterior
from qpruner.search.searchers import History, Observation, Prior

MAX_ENUMERATED = 4096
"""Spaces of at most so many plans, over budget or not, are enumerated."""
NUM_SAMPLES = 12
"""Samples of the effects; the knapsack of each is a candidate."""
NUM_ASCENTS = 2
"""Steps from each of these knapsacks up the expected improvement."""
NUM_CENTERS = 4
"""Best plans whose neighbours become candidates."""
NUM_NEIGHBOURS = 30
"""Neighbours of one plan that differ in one group, and as many that differ in two."""
NUM_CLIMBS = 2
"""Rounds of neighbours: of the best known plans, then of the best candidates."""
Row = tuple[int, ...]
"""A plan as `SearchSpace` numbers it: the level of each group, and the cut."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread.

    A proposal beside two other jobs on two cores then took 0.9 s instead of 12 s.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class GaussianProcessProposer:
    """Proposes the plan with the largest log expected improvement.

    The improvement is over the plan of least expected score among those scored or running.
    """

    name = "gp"

    def __init__(self, space: SearchSpace, seed: int, priors: Mapping[str, Prior]) -> None:
        self._seed = seed
        self._model = PlanModel(space, priors)
        self._plans = Plans(space)
        self._fit: tuple[tuple[Observation, ...], Posterior] | None = None

    @_one_thread()
    def propose(self, index: int, history: History) -> PrecisionPlan:
        """Return a feasible plan that is not in `history`; if there is none, the smallest plan."""
        plans = self._plans
        generator = np.random.default_rng([self._seed, index])
        pending = plans.tensor(history.pending)
        observed = [item.plan for item in history.observations]
        if not observed and not history.pending:
            return plans.space.plan_of(plans.random(generator))

        posterior = self._posterior(history).with_pending(pending)
        known = posterior.plans
        inside = torch.cat([known[plans.sizes(known) <= plans.capacity], plans.smallest])
        best = inside[posterior.mean(inside).argsort()[:NUM_CENTERS]]
        seen = {plans.row(plan) for plan in (*observed, *history.pending, *history.failed)}
        candidates, values = self._candidates(posterior, best, seen, generator)
        if not len(candidates):
            return plans.space.plan_of(plans.smallest[0])
        return plans.space.plan_of(candidates[int(values.argmax())])

    def _posterior(self, history: History) -> Posterior:
        """Return the posterior of the scores; fit it if they differ from those of the last call."""
        if self._fit is None or self._fit[0] != history.observations:
            steps = {item.step for item in history.observations}
            data = Data.of(self._model, informative(history.observations), steps)
            self._fit = history.observations, Posterior(self._model, data)
        return self._fit[1]

    def _candidates(
        self,
        posterior: Posterior,
        best: Tensor,
        seen: set[Row],
        generator: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return new plans ``(n, groups + 1)`` and the log expected improvement ``(n,)`` of each.

        The improvement is over the first of the plans `best`; the neighbours of all of these are
        candidates.
        """
        reference = best[:1]
        if self._plans.all is not None:
            candidates = self._plans.new(self._plans.all, seen)
            return candidates, _log_improvement(posterior, candidates, reference)
        candidates = self._plans.new(self._ascents(posterior, reference, generator), seen)
        values = _log_improvement(posterior, candidates, reference)
        centers = best
        for _ in range(NUM_CLIMBS):
            slopes = posterior.slopes(centers, reference)
            around = map(self._plans.neighbours, centers, slopes)
            fresh = self._plans.new(torch.cat(list(around)), seen)
            candidates = torch.cat([candidates, fresh])
            values = torch.cat([values, _log_improvement(posterior, fresh, reference)])
            centers = candidates[values.argsort(descending=True)[:NUM_CENTERS]]
        return candidates, values

    def _ascents(
        self, posterior: Posterior, reference: Tensor, generator: np.random.Generator
    ) -> Tensor:
        """Return the best plan by each sample of the effects, and steps up the improvement."""
        noise = torch.tensor(generator.standard_normal((NUM_SAMPLES, self._model.num_effects)))
        effects = posterior.effects(noise)
        num_cuts = len(self._plans.bytes)
        cuts = torch.arange(num_cuts).repeat_interleave(len(effects))
        plans = [self._plans.knapsacks(effects.repeat(num_cuts, 1, 1), cuts)]
        for _ in range(NUM_ASCENTS):
            plans.append(self._plans.knapsacks(posterior.slopes(plans[-1], reference), cuts))
        return torch.cat(plans)


def _log_improvement(posterior: Posterior, candidates: Tensor, reference: Tensor) -> Tensor:
    """Return the logarithm ``(n,)`` of the expected improvement of plans over the reference.

    Candidates are rows ``(n, groups + 1)``, and the reference is one row ``(1, groups + 1)``.
    """
    mean, variance = posterior.gap(candidates, reference)
    deviation = variance.sqrt()
    # Not by `LogExpectedImprovement`, which takes a model: GPyTorch's inference over thousands of
    # candidates took 3 s at 500 observations, a hundred times as long.
    values: Tensor = _log_ei_helper(-mean / deviation) + deviation.log()
    return values


class Plans:
    """Handles plans as rows of `SearchSpace`, int64 ``(n, groups + 1)``, and knows their bytes."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        sizes = torch.tensor(space.tables)
        self._offered = [indices_offered(table) for table in space.tables]
        last = torch.tensor([[levels[-1] for levels in offered] for offered in self._offered])
        self.is_offered = ~sizes.isnan()  # (cuts, groups, levels)
        self.bytes = sizes.where(self.is_offered, sizes.gather(2, last[:, :, None])).long()
        """A level that a group is not offered has the bytes of the group's last level."""
        self._fixed = torch.tensor([of_cut.fixed_bytes for of_cut in space.spaces])
        self.capacity = space.budget_bytes
        self._rows_of: dict[PrecisionPlan, Row] = {}
        self._groups = torch.arange(len(space.groups))
        self._cuts = torch.arange(len(space.cuts))
        smallest = self.bytes.masked_fill(~self.is_offered, torch.iinfo(torch.int64).max).argmin(2)
        self.smallest = torch.cat([smallest, self._cuts[:, None]], 1)
        """The smallest plan of every cut."""

    @cached_property
    def all(self) -> Tensor | None:
        """Enumerate the plans inside the budget; None if the space has too many plans."""
        if sum(math.prod(map(len, offered)) for offered in self._offered) > MAX_ENUMERATED:
            return None
        rows: list[Row] = []
        for cut, offered in enumerate(self._offered):
            rows += itertools.product(*offered, [cut])
        plans = torch.tensor(rows)
        return plans[self.sizes(plans) <= self.capacity]

    def row(self, plan: PrecisionPlan) -> Row:
        """Return a plan as a row of `SearchSpace`; the rows of all plans so far are kept."""
        if plan not in self._rows_of:
            self._rows_of[plan] = self.space.indices_of(plan)
        return self._rows_of[plan]

    def tensor(self, plans: Iterable[PrecisionPlan]) -> Tensor:
        """Convert plans to rows."""
        rows = [self.row(plan) for plan in plans]
        return torch.tensor(rows, dtype=torch.long).reshape(-1, len(self.space.groups) + 1)

    def sizes(self, plans: Tensor) -> Tensor:
        """Return the bytes ``(n,)`` of the model of each plan."""
        of_groups = self.bytes[plans[:, -1:], self._groups, plans[:, :-1]]
        return of_groups.sum(1) + self._fixed[plans[:, -1]]

    def new(self, plans: Tensor, seen: set[Row]) -> Tensor:
        """Return the plans that are inside the budget and not in `seen`, and add them to `seen`."""
        inside = plans[self.sizes(plans) <= self.capacity]
        fresh = []
        for position, levels in enumerate(inside.tolist()):
            row = tuple(levels)
            if row not in seen:
                seen.add(row)
                fresh.append(position)
        return inside[fresh]

    def random(self, generator: np.random.Generator) -> Tensor:
        """Draw a plan that fills the budget: no group can get a larger level any more."""
        worth = torch.tensor(generator.exponential(size=self.bytes.shape[1:]))
        cut = self._cuts[[int(generator.integers(len(self._cuts)))]]
        costs = -worth.cumsum(1).gather(1, self.bytes[cut][0].argsort(1).argsort(1))
        return self.knapsacks(costs[None], cut)[0]

    def knapsacks(self, costs: Tensor, cuts: Tensor) -> Tensor:
        """Find plans of nearly least cost, each inside the budget or the smallest of its cut.

        Bisect a price per byte (Lagrange's relaxation) for a first plan, then raise groups as long
        as bytes are left. For 12 plans of 120 groups in 8 formats this takes 0.02 s, and the exact
        knapsacks of `PlanSpace` 5 s; they save at most 0.02 % more (2026-12-03).

        Args:
            costs: What each level costs in each plan, ``(s, groups, levels)``.
            cuts: The cut of each plan, ``(s,)``.

        Returns:
            The plans ``(s, groups + 1)``.
        """
        bytes_ = self.bytes[cuts].to(torch.float64)
        capacities = (self.capacity - self._fixed[cuts]).to(torch.float64)
        steps = bytes_.sort(2).values.diff(dim=2)
        spread = (costs.amax((1, 2)) - costs.amin((1, 2))).clamp_min(1e-300)
        costs = costs.masked_fill(~self.is_offered[cuts], math.inf)
        least = steps[steps > 0].min() if bool((steps > 0).any()) else 1.0
        low = torch.zeros_like(spread)
        high = 2 * spread / least
        for _ in range(30):
            price = (low + high) / 2
            plans = (costs + price[:, None, None] * bytes_).argmin(2)
            over = bytes_.gather(2, plans[:, :, None]).sum((1, 2)) > capacities
            low = torch.where(over, price, low)
            high = torch.where(over, high, price)
        plans = (costs + high[:, None, None] * bytes_).argmin(2)
        while True:
            current = plans[:, :, None]
            taken = bytes_.gather(2, current)
            room = capacities - taken.sum((1, 2))
            is_too_large = bytes_ - taken > room[:, None, None]
            gains = (costs.gather(2, current) - costs).masked_fill(is_too_large, 0)
            gain, position = gains.flatten(1).max(1)
            rows = torch.nonzero(gain > 0)[:, 0]
            if not len(rows):
                return torch.cat([plans, cuts[:, None]], 1)
            position = position[rows]
            plans[rows, position // costs.shape[2]] = position % costs.shape[2]

    def neighbours(self, plan: Tensor, costs: Tensor) -> Tensor:
        """Return the plans ``(n, groups + 1)`` of least cost near a plan ``(groups + 1,)``.

        Costs are of levels, ``(groups, levels)``. The plans are `NUM_NEIGHBOURS` that differ in one
        group, and as many in which one group has more bytes and another one fewer. All are inside
        the budget if `plan` is.
        """
        levels = plan[:-1]
        bytes_ = self.bytes[plan[-1]]
        growth = bytes_ - bytes_[self._groups, levels][:, None]
        rise = costs - costs[self._groups, levels][:, None]
        room = self.capacity - self.sizes(plan[None])[0]
        is_other = self.is_offered[plan[-1]] & (torch.arange(costs.shape[1]) != levels[:, None])
        moves = _least(rise.masked_fill(~is_other | (growth > room), math.inf))

        ups = torch.nonzero(is_other & (growth > 0))
        downs = torch.nonzero(is_other & (growth < 0))
        paid = growth[tuple(ups.T)][:, None] + growth[tuple(downs.T)] <= room
        paid &= ups[:, :1] != downs[:, 0]
        total = rise[tuple(ups.T)][:, None] + rise[tuple(downs.T)]
        swaps = _least(total.masked_fill(~paid, math.inf))

        one = plan.repeat(len(moves), 1)
        one[torch.arange(len(moves)), moves[:, 0]] = moves[:, 1]
        two = plan.repeat(len(swaps), 1)
        for changed in (ups[swaps[:, 0]], downs[swaps[:, 1]]):
            two[torch.arange(len(swaps)), changed[:, 0]] = changed[:, 1]
        return torch.cat([one, two])


def _least(costs: Tensor) -> Tensor:
    """Return the positions ``(n, 2)`` of the `NUM_NEIGHBOURS` least finite costs of a matrix."""
    flat = costs.flatten()
    number = min(NUM_NEIGHBOURS, int(flat.isfinite().sum()))
    positions = flat.topk(number, largest=False).indices
    columns = max(1, costs.shape[1])
    return torch.stack([positions // columns, positions % columns], 1)
