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
from typing import TypeVar

from qpruner.errors import SolverFailed
from qpruner.plans.plan import UNPRUNED, Layout, PrecisionPlan, next_format
from qpruner.quantization.formats import by_size, format_of

SOLVER_SECONDS = 60.0  # time limit of one knapsack; 120 groups take 0.1 s (2026-11)
# most plans excluded one by one because they exceed the budget by less than HiGHS's tolerance
MAX_EXCLUDED = 64
Cell = tuple[str, str]  # a group and a level
Value = TypeVar("Value")


@contextmanager
def _native_output_dropped() -> Iterator[None]:
    """Discard stdout of native code.

    HiGHS (scipy 1.18) prints a debugging line, which would spoil JSON output.
    """
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    stdout, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(devnull)


@dataclass(frozen=True)
class PlanSpace:
    """Hold all plans of one cut that fit into a byte budget.

    This is all that a searcher knows about the model.
    """

    groups: tuple[str, ...]  # names, in model order
    levels: tuple[str, ...]  # formats, smallest first
    group_bytes: tuple[
        tuple[int | None, ...], ...
    ]  # (groups, levels); None where a group is not offered a level
    fixed_bytes: int  # the same in all plans
    budget_bytes: int
    cut: str = UNPRUNED
    damage: tuple[tuple[float | None, ...], ...] = ()
    """Relative squared error of each (group, level), None where not offered; empty if not
    measured."""
    base_groups: tuple[str, ...] = ()
    """The names of the same groups in the base model, where no block was dropped; empty: equal to
    `groups`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_groups", self.base_groups or self.groups)

    @classmethod
    def of(
        cls,
        layout: Layout,
        budget_bytes: int,
        error: Mapping[str, Mapping[str, float]] | None = None,
        base_groups: tuple[str, ...] = (),
    ) -> PlanSpace:
        """Make the plan space of a cut with this budget.

        `error` is measured: format -> group of the base model -> relative square; it counts for all
        cuts.
        """
        levels, groups = layout.levels, tuple(group.name for group in layout.groups)
        group_bytes = tuple(zip(*map(layout.group_bytes, levels), strict=True))
        fixed_bytes = layout.ungrouped_bytes + layout.adapter_bytes
        known, damage = error or {}, []
        for group, name in zip(layout.groups, base_groups or groups, strict=True) if known else ():
            of_packed = {level: known.get(level, {}).get(name) for level in group.formats}
            of_group = {
                level: each if format_of(level).is_packed else 0.0
                for level, each in of_packed.items()
            }
            damage.append(tuple(map(of_group.get, levels)))
        return cls(
            groups,
            levels,
            group_bytes,
            fixed_bytes,
            budget_bytes,
            layout.cut,
            tuple(damage),
            base_groups,
        )

    @cached_property
    def offered(self) -> tuple[tuple[int, ...], ...]:
        """The indices in `levels` that each group may have, ascending."""
        return tuple(
            tuple(at for at, size in enumerate(sizes) if size is not None)
            for sizes in self.group_bytes
        )

    @cached_property
    def _formats(self) -> tuple[dict[str, int], ...]:
        """The formats that each group may have, with their bytes."""
        return tuple(
            {name: size for name, size in zip(self.levels, sizes, strict=True) if size is not None}
            for sizes in self.group_bytes
        )

    def __contains__(self, plan: object) -> bool:
        """Return True for a plan of this cut whose groups all have formats that they are offered.

        It may be over the budget.
        """
        if not isinstance(plan, PrecisionPlan) or (plan.cut, plan.groups) != (
            self.cut,
            self.groups,
        ):
            return False
        return all(
            name in offered for name, offered in zip(plan.formats, self._formats, strict=True)
        )

    def uniform(self, name: str) -> PrecisionPlan:
        """Return the plan with every group in one format.

        A group that is not offered it takes its next larger one.
        """
        return self._plan(next_format(name, tuple(offered)) for offered in self._formats)

    def smallest(self) -> PrecisionPlan:
        """Return the plan with the fewest bytes."""
        return self._plan(min(offered, key=offered.__getitem__) for offered in self._formats)

    def plan_of(self, indices: Iterable[int]) -> PrecisionPlan:
        """Return the plan in which each group has the format at its index in `levels`."""
        return self._plan(self.levels[int(index)] for index in indices)

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
        sizes = zip(plan.formats, self._formats, strict=True)
        return sum(offered[name] for name, offered in sizes) + self.fixed_bytes

    def is_feasible(self, plan: PrecisionPlan) -> bool:
        """Return True if the plan is in this space and fits into the budget."""
        return plan in self and self.plan_bytes(plan) <= self.budget_bytes

    def _plan(self, names: Iterable[str]) -> PrecisionPlan:
        return PrecisionPlan(self.groups, tuple(names), self.cut)

    def best_by_gain(self, gains: Sequence[Sequence[float]]) -> PrecisionPlan:
        """Return the plan in the budget with the largest sum of gains, by an exact knapsack.

        `gains` is ``(groups, levels)``; those of levels that a group is not offered do not matter.
        Raise `ValueError` if no plan fits into the budget, and `SolverFailed` if the solver ends
        without an answer.
        """
        if (plan := self._solve(gains, avoid=())) is None:
            raise ValueError(f"no plan fits in {self.budget_bytes} bytes")
        return plan

    def nearest_feasible(
        self, plan: PrecisionPlan, avoid: Iterable[PrecisionPlan] = ()
    ) -> PrecisionPlan | None:
        """Return the plan in the budget that differs from `plan` in the fewest groups.

        Plans in `avoid` are left out. Of equally near plans the one with the most bytes is
        returned. Return None if no plan is left.
        """
        avoided = {each for each in avoid if each in self}
        if self.is_feasible(plan) and plan not in avoided:
            return plan
        # The byte terms of all groups sum to less than one, so they only break ties between equally
        # near plans.
        limit = 1.0 + sum(max(offered.values()) for offered in self._formats)
        gains = [
            [
                (level == wanted) + (size or 0) / limit
                for level, size in zip(self.levels, sizes, strict=True)
            ]
            for wanted, sizes in zip(plan.formats, self.group_bytes, strict=True)
        ]
        # Excluding plans makes the problem larger, and most proposals do not need it: solve it
        # without them first.
        found = self._solve(gains, ())
        return self._solve(gains, avoided) if found in avoided else found

    def _solve(
        self, gains: Sequence[Sequence[float]], avoid: Iterable[PrecisionPlan]
    ) -> PrecisionPlan | None:
        """Return the plan in the budget, not in `avoid`, with the largest sum of gains.

        Return None if there is no such plan. HiGHS accepts plans that exceed the budget by up to a
        millionth of it. If it returns one, it is run again with a slightly smaller budget. If that
        does not help, plans over the budget are excluded one by one.
        """
        excluded = list(avoid)
        for margin in (0.0, 2e-6, 2e-5):
            plan = self._optimum(gains, excluded, margin)
            if plan is None and margin == 0.0:
                return None
            if plan is not None and self.is_feasible(plan):
                return plan
        for _ in range(MAX_EXCLUDED):
            plan = self._optimum(gains, excluded, margin=0.0)
            if plan is None or self.is_feasible(plan):
                return plan
            excluded.append(plan)
        raise SolverFailed(
            f"HiGHS found only plans that exceed the budget of {self.budget_bytes} bytes by less than a millionth "
            f"({MAX_EXCLUDED} of them): raise `quantize.budget` by a millionth, or form fewer groups (`quantize.group`)"
        )

    def _optimum(
        self, gains: Sequence[Sequence[float]], avoid: Sequence[PrecisionPlan], margin: float
    ) -> PrecisionPlan | None:
        """Solve the knapsack for plans not in `avoid`; return None if there are none.

        The share `margin` of the budget is left unused.
        """
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp

        sizes = np.array(self.group_bytes, dtype=float)
        is_offered = ~np.isnan(sizes)  # None is NaN
        gain, sizes = (
            np.where(is_offered, np.array(gains, dtype=float), 0.0),
            np.where(is_offered, sizes, 0.0),
        )
        num_groups, num_levels = gain.shape
        capacity = float(self.budget_bytes - self.fixed_bytes)
        budget = LinearConstraint(
            sizes.ravel()[None, :] / max(capacity, 1.0), -np.inf, 1.0 - margin
        )
        constraints = [LinearConstraint(np.kron(np.eye(num_groups), np.ones(num_levels)), 1, 1)]
        if excluded := [
            [name == level for name in other.formats for level in self.levels] for other in avoid
        ]:
            constraints.append(
                LinearConstraint(np.array(excluded, dtype=float), -np.inf, num_groups - 1)
            )
        with _native_output_dropped():
            solution = milp(
                c=-gain.ravel(),
                constraints=[*constraints, budget],
                integrality=np.ones(gain.size),
                bounds=Bounds(0, is_offered.ravel().astype(float)),
                options={"mip_rel_gap": 0.0, "time_limit": SOLVER_SECONDS},
            )
        if solution.status == 2:  # proved to have no solution
            return None
        if not solution.success:
            raise SolverFailed(
                f"the solver HiGHS found no plan of {num_groups} groups in {self.budget_bytes} bytes: it ended with "
                f"status {solution.status} ({solution.message}), with a limit of {SOLVER_SECONDS:g} s; try again, or "
                "form fewer groups (`quantize.group`)"
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

    @cached_property
    def cuts(self) -> tuple[str, ...]:
        """The names of the cuts, least pruned first."""
        return tuple(space.cut for space in self.spaces)

    @property
    def budget_bytes(self) -> int:
        """The budget of all cuts."""
        return self.spaces[0].budget_bytes

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of any cut, by their names in the base model."""
        return self.whole.groups

    @property
    def levels(self) -> tuple[str, ...]:
        """The formats of any cut, smallest first."""
        return self.whole.levels

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
        avoided, first = tuple(avoid), self.cuts.index(plan.cut)
        found = self.spaces[first].nearest_feasible(plan, avoided)
        for at in (*range(first + 1, len(self.cuts)), *range(first)):
            moved = self.plan_of((*self.indices_of(plan)[:-1], at))
            found = found or self.spaces[at].nearest_feasible(moved, avoided)
        return found

    def indices_of(self, plan: PrecisionPlan) -> tuple[int, ...]:
        """Return the row of a plan ``(groups + 1,)``, see the class."""
        formats = dict(zip(self.of_cut(plan.cut).base_groups, plan.formats, strict=True))
        named = zip(self.groups, self.whole.offered, strict=True)
        levels = (
            self.levels.index(formats[name]) if name in formats else offered[-1]
            for name, offered in named
        )
        return (*levels, self.cuts.index(plan.cut))

    def plan_of(self, indices: Iterable[int]) -> PrecisionPlan:
        """Return the plan of a row of indices.

        A group that its cut does not offer the level gets its next larger one.
        """
        *levels, cut = map(int, indices)
        space, chosen = self.spaces[cut], dict(zip(self.groups, levels, strict=True))
        offered = (tuple(space.levels[at] for at in each) for each in space.offered)
        wanted = (self.levels[chosen[name]] for name in space.base_groups)
        return PrecisionPlan(space.groups, tuple(map(next_format, wanted, offered)), space.cut)

    @cached_property
    def whole(self) -> PlanSpace:
        """Return all groups and levels in one space.

        Bytes and damage are those of the least pruned cut that offers a group the level.
        """
        groups = tuple(dict.fromkeys(name for space in self.spaces for name in space.base_groups))
        levels = by_size(tuple({name for space in self.spaces for name in space.levels}))
        sizes, damage = dict[Cell, int](), dict[Cell, float]()
        for space in reversed(self.spaces):
            sizes |= _cells(space, space.group_bytes)
            damage |= _cells(space, space.damage)
        of_levels = _rows(groups, levels, damage) if damage else ()
        return PlanSpace(
            groups, levels, _rows(groups, levels, sizes), 0, self.budget_bytes, damage=of_levels
        )

    @cached_property
    def aligned(self) -> tuple[PlanSpace, ...]:
        """The plans of each cut, over the groups and levels of all cuts."""
        lost = {
            (name, self.levels[at[-1]]): 0
            for name, at in zip(self.groups, self.whole.offered, strict=True)
        }
        found = []
        for space in self.spaces:
            kept = _cells(space, space.group_bytes)
            sizes = {
                cell: size for cell, size in lost.items() if cell[0] not in space.base_groups
            } | kept
            rows = _rows(self.groups, self.levels, sizes)
            found.append(
                PlanSpace(
                    self.groups, self.levels, rows, space.fixed_bytes, space.budget_bytes, space.cut
                )
            )
        return tuple(found)


def _cells(space: PlanSpace, rows: Sequence[Sequence[Value | None]]) -> dict[Cell, Value]:
    """Map each (group, level) to its value in rows ``(groups, levels)``, if it has one."""
    return {
        (group, level): value
        for group, row in zip(space.base_groups, rows, strict=False)
        for level, value in zip(space.levels, row, strict=True)
        if value is not None
    }


def _rows(
    groups: Sequence[str], levels: Sequence[str], cells: Mapping[Cell, Value]
) -> tuple[tuple[Value | None, ...], ...]:
    return tuple(tuple(cells.get((group, level)) for level in levels) for group in groups)
