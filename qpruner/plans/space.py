"""Define the plans that fit into a byte budget, of one cut or of several, without torch.

The best of them by a sum of gains is solved for exactly.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qpruner.errors import SolverFailed
from qpruner.plans.plan import UNPRUNED, Layout, PlansOfCut, PrecisionPlan, next_format
from qpruner.quantization.formats import by_size

SOLVER_SECONDS = 60.0  # time limit of one knapsack; 120 groups take 0.1 s (2026-11)
# most plans excluded one by one because they exceed the budget by less than HiGHS's tolerance
MAX_EXCLUDED = 64


@contextmanager
def _native_output_dropped() -> Iterator[None]:
    """Discard stdout of native code.

    HiGHS (scipy 1.18) prints a debugging line, which would spoil JSON output.
    """
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    stdout = os.dup(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(devnull)


@dataclass(frozen=True)
class PlanSpace(PlansOfCut):
    """Hold all plans of one cut that fit into a byte budget.

    This is all that a searcher knows about the model.
    """

    groups: tuple[str, ...]  # names, in model order
    levels: tuple[str, ...]  # formats, smallest first
    group_bytes: tuple[tuple[int | None, ...], ...]
    """Bytes of each (group, level), None where not offered."""
    fixed_bytes: int  # the same in all plans
    budget_bytes: int
    cut: str = UNPRUNED
    base_groups: tuple[str, ...] = ()
    """The names of the same groups in the base model, where no block was dropped; empty: equal to
    `groups`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_groups", self.base_groups or self.groups)

    @classmethod
    def of(cls, layout: Layout, budget_bytes: int, base_groups: tuple[str, ...] = ()) -> PlanSpace:
        """Make the plan space of a cut with this budget."""
        return cls(
            groups=layout.names,
            levels=layout.levels,
            group_bytes=tuple(tuple(map(sizes.get, layout.levels)) for sizes in layout.sizes),
            fixed_bytes=layout.fixed_bytes,
            budget_bytes=budget_bytes,
            cut=layout.cut,
            base_groups=base_groups,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the groups, in model order."""
        return self.groups

    @cached_property
    def sizes(self) -> tuple[dict[str, int], ...]:
        """Return the bytes of each group in the formats that it is offered, smallest first."""
        sizes = []
        for row in self.group_bytes:
            by_level = zip(self.levels, row, strict=True)
            sizes.append({level: size for level, size in by_level if size is not None})
        return tuple(sizes)

    @cached_property
    def table(self) -> np.ndarray:
        """The bytes of each group in each level ``(groups, levels)``, NaN where not offered."""
        return np.array(self.group_bytes, dtype=float)

    @cached_property
    def offered(self) -> tuple[tuple[int, ...], ...]:
        """The indices in `levels` that each group may have, ascending."""
        return indices_offered(self.table)

    def __contains__(self, plan: object) -> bool:
        """Return True for a plan of this cut whose groups all have formats that they are offered.

        It may be over the budget.
        """
        if not isinstance(plan, PrecisionPlan):
            return False
        if plan.cut != self.cut or plan.groups != self.groups:
            return False
        formats = zip(plan.formats, self.sizes, strict=True)
        return all(name in offered for name, offered in formats)

    def plan_of(self, indices: Iterable[int]) -> PrecisionPlan:
        """Return the plan in which each group has the format at its index in `levels`."""
        return self.plan(self.levels[int(index)] for index in indices)

    def indices_of(self, plan: PrecisionPlan) -> tuple[int, ...]:
        """Return the index in `levels` of each group's format."""
        return tuple(self.levels.index(name) for name in plan.formats)

    def plan_bytes(self, plan: PrecisionPlan) -> int:
        """Count the bytes of the whole model under `plan`.

        Raise `ValueError` for a plan outside this space.
        """
        if plan not in self:
            raise ValueError(
                f"the plan {plan} of the cut {plan.cut} is not in the space of the cut {self.cut}"
            )
        formats = zip(plan.formats, self.sizes, strict=True)
        return sum(offered[name] for name, offered in formats) + self.fixed_bytes

    def is_feasible(self, plan: PrecisionPlan) -> bool:
        """Return True if the plan is in this space and fits into the budget."""
        return plan in self and self.plan_bytes(plan) <= self.budget_bytes

    def best_by_gain(self, gains: npt.ArrayLike) -> PrecisionPlan:
        """Return the plan in the budget with the largest sum of gains, by an exact knapsack.

        `gains` is ``(groups, levels)``; those of levels that a group is not offered do not matter.
        Raise `ValueError` if no plan fits into the budget, and `SolverFailed` if the solver ends
        without an answer.
        """
        plan = self._solve(gains, avoid=())
        if plan is None:
            raise ValueError(f"no plan fits in {self.budget_bytes} bytes")
        return plan

    def nearest_feasible(
        self, plan: PrecisionPlan, avoid: Iterable[PrecisionPlan] = ()
    ) -> PrecisionPlan | None:
        """Return the plan in the budget that differs from `plan` in the fewest groups.

        Plans in `avoid` are left out. Of equally near plans the one with the most bytes is
        returned. Return None if no plan is left.
        """
        avoided = {candidate for candidate in avoid if candidate in self}
        if self.is_feasible(plan) and plan not in avoided:
            return plan

        # The byte terms of all groups sum to less than one, so they only break ties between equally
        # near plans.
        sizes = np.nan_to_num(self.table)
        is_same = np.array(self.levels) == np.array(plan.formats)[:, None]
        gains = is_same + sizes / (1.0 + sizes.max(axis=1).sum())

        # Excluding plans makes the problem larger, and most proposals do not need it: solve it
        # without them first.
        nearest = self._solve(gains, ())
        return self._solve(gains, avoided) if nearest in avoided else nearest

    def _solve(self, gains: npt.ArrayLike, avoid: Iterable[PrecisionPlan]) -> PrecisionPlan | None:
        """Return the plan in the budget, not in `avoid`, with the largest sum of gains.

        Return None if there is no such plan. HiGHS accepts plans that exceed the budget by up to a
        millionth of it. If it returns one, it is run again with a slightly smaller budget. If that
        does not help, plans over the budget are excluded one by one.
        """
        excluded = list(avoid)
        for margin in (0.0, 2e-6, 2e-5, *[0.0] * MAX_EXCLUDED):
            plan = self._optimum(gains, excluded, margin)
            if plan is not None and self.is_feasible(plan):
                return plan
            if margin == 0.0:
                if plan is None:
                    return None
                excluded.append(plan)
        raise SolverFailed(
            f"HiGHS found only plans that exceed the budget of {self.budget_bytes} bytes by less "
            f"than a millionth ({MAX_EXCLUDED} of them): raise `quantize.budget` by a millionth, "
            "or form fewer groups (`quantize.group`)"
        )

    def _optimum(
        self, gains: npt.ArrayLike, avoid: Sequence[PrecisionPlan], margin: float
    ) -> PrecisionPlan | None:
        """Solve the knapsack for plans not in `avoid`; return None if there are none.

        The share `margin` of the budget is left unused.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        is_offered = ~np.isnan(self.table)
        sizes = np.nan_to_num(self.table)
        gain = np.where(is_offered, gains, 0.0)
        num_groups, num_levels = gain.shape

        # Unknowns are 1 where a group has a level, in the order (groups, levels).
        one_level_each = np.kron(np.eye(num_groups), np.ones(num_levels))
        capacity = max(float(self.budget_bytes - self.fixed_bytes), 1.0)
        constraints = [
            LinearConstraint(one_level_each, 1, 1),
            LinearConstraint(sizes.ravel()[None, :] / capacity, -np.inf, 1.0 - margin),
        ]
        if avoid:
            has_level = np.array([self.indices_of(plan) for plan in avoid])[:, :, None]
            excluded = (has_level == np.arange(num_levels)).reshape(len(avoid), -1)
            constraints.insert(1, LinearConstraint(excluded.astype(float), -np.inf, num_groups - 1))
        with _native_output_dropped():
            solution = milp(
                c=-gain.ravel(),
                constraints=constraints,
                integrality=np.ones(gain.size),
                bounds=Bounds(0, is_offered.ravel().astype(float)),
                options={"mip_rel_gap": 0.0, "time_limit": SOLVER_SECONDS},
            )
        if solution.status == 2:  # proved to have no solution
            return None
        if not solution.success:
            raise SolverFailed(
                f"the solver HiGHS found no plan of {num_groups} groups in {self.budget_bytes} "
                f"bytes: it ended with status {solution.status} ({solution.message}), with a limit "
                f"of {SOLVER_SECONDS:g} s; try again, or form fewer groups (`quantize.group`)"
            )
        return self.plan_of(solution.x.reshape(num_groups, num_levels).argmax(axis=1))


@dataclass(frozen=True)
class SearchSpace:
    """Hold all plans of the cuts of a search that fit into its byte budget.

    A plan is a cut and a format for each group. A plan is also a row of indices: of each group's
    format in `levels`, then of the cut in `cuts`. The groups are those of the base model. A group
    that a cut has lost keeps its highest level and takes no bytes.
    """

    spaces: tuple[PlanSpace, ...]  # of one budget; one for each cut, least pruned first
    losses: Mapping[str, float] = field(default_factory=dict)
    """Loss of each cut before any fine-tune, in nats; empty: not measured."""
    errors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Relative squared error of the weights: format -> of each group; empty: not measured."""

    @cached_property
    def cuts(self) -> tuple[str, ...]:
        """The names of the cuts, least pruned first."""
        return tuple(space.cut for space in self.spaces)

    @property
    def budget_bytes(self) -> int:
        """The budget of all cuts."""
        return self.spaces[0].budget_bytes

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups of any cut, by their names in the base model."""
        return tuple(dict.fromkeys(name for space in self.spaces for name in space.base_groups))

    @cached_property
    def levels(self) -> tuple[str, ...]:
        """The formats of any cut, smallest first."""
        return by_size(set().union(*(space.levels for space in self.spaces)))

    @cached_property
    def tables(self) -> np.ndarray:
        """The bytes of each group in each level ``(cuts, groups, levels)``, NaN where not offered.

        A group that a cut has lost takes 0 bytes in its highest level.
        """
        tables = self._own_tables()
        for table in tables:
            for group, offered in enumerate(self.offered):
                if np.isnan(table[group]).all():
                    table[group, offered[-1]] = 0
        return tables

    def _own_tables(self) -> np.ndarray:
        """Return the `tables` with NaN for groups that a cut has lost."""
        tables = np.full((len(self.spaces), len(self.groups), len(self.levels)), np.nan)
        for table, space in zip(tables, self.spaces, strict=True):
            rows = list(map(self.groups.index, space.base_groups))
            columns = list(map(self.levels.index, space.levels))
            table[np.ix_(rows, columns)] = space.table
        return tables

    @cached_property
    def table(self) -> np.ndarray:
        """The bytes ``(groups, levels)`` in the least pruned cut that offers a group the level."""
        tables = self._own_tables()
        table: np.ndarray = tables[0]
        for other in tables[1:]:
            table = np.where(np.isnan(table), other, table)
        return table

    @cached_property
    def offered(self) -> tuple[tuple[int, ...], ...]:
        """The indices in `levels` that each group may have in any cut, ascending."""
        return indices_offered(self.table)

    def of_cut(self, cut: str) -> PlanSpace:
        """Return the plans of one cut; raise `ValueError` for a cut that is not searched."""
        if cut not in self.cuts:
            raise ValueError(f"the cut {cut} is not searched, only {', '.join(self.cuts)}")
        return self.spaces[self.cuts.index(cut)]

    def __contains__(self, plan: object) -> bool:
        """Return True for a plan of one of these cuts with formats that are offered.

        It may be over the budget.
        """
        return any(plan in space for space in self.spaces)

    def plan_bytes(self, plan: PrecisionPlan) -> int:
        """Count the bytes of the whole model under `plan`.

        Raise `ValueError` for a plan outside this space.
        """
        return self.of_cut(plan.cut).plan_bytes(plan)

    def is_feasible(self, plan: PrecisionPlan) -> bool:
        """Return True if the plan is in this space and fits into the budget."""
        return any(space.is_feasible(plan) for space in self.spaces)

    def nearest_feasible(
        self, plan: PrecisionPlan, avoid: Iterable[PrecisionPlan] = ()
    ) -> PrecisionPlan | None:
        """Return the nearest plan of the same cut in the budget that is not in `avoid`.

        See `PlanSpace.nearest_feasible`. If that cut has none left, return one of the next cut.
        Return None if no cut has one.
        """
        avoided = tuple(avoid)
        nearest = self.of_cut(plan.cut).nearest_feasible(plan, avoided)
        if nearest is not None:
            return nearest

        *levels, first = self.indices_of(plan)
        for space in self.spaces[first + 1 :] + self.spaces[:first]:
            moved = self.plan_of((*levels, self.cuts.index(space.cut)))
            nearest = space.nearest_feasible(moved, avoided)
            if nearest is not None:
                break
        return nearest

    def indices_of(self, plan: PrecisionPlan) -> tuple[int, ...]:
        """Return the row of a plan ``(groups + 1,)``, see the class."""
        formats = dict(zip(self.of_cut(plan.cut).base_groups, plan.formats, strict=True))
        row = []
        for name, offered in zip(self.groups, self.offered, strict=True):
            is_lost = name not in formats
            row.append(offered[-1] if is_lost else self.levels.index(formats[name]))
        return (*row, self.cuts.index(plan.cut))

    def plan_of(self, indices: Iterable[int]) -> PrecisionPlan:
        """Return the plan of a row of indices.

        A group that its cut does not offer the level gets its next larger one.
        """
        *row, cut = map(int, indices)
        space = self.spaces[cut]
        levels = dict(zip(self.groups, row, strict=True))
        formats = []
        for name, offered in zip(space.base_groups, space.sizes, strict=True):
            formats.append(next_format(self.levels[levels[name]], tuple(offered)))
        return space.plan(formats)


def indices_offered(table: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Return, ascending, the levels of each group with bytes in a table ``(groups, levels)``."""
    return tuple(tuple(np.flatnonzero(~np.isnan(row)).tolist()) for row in table)
