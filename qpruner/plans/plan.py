"""Define precision plans, groups and their sizes, read a plan file, find the best plan in a budget; without torch."""

from __future__ import annotations

import ctypes
import difflib
import html
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qpruner.config.load import parse_yaml
from qpruner.errors import PlanRefused, SolverFailed, UserError

NF4_BLOCK_SIZE = 64  # weights that share one absmax scale
NESTED_BLOCK_SIZE = 256  # scales that share one nested scale under double quantization
FULL_BITS = 16  # unquantized: the group keeps its floating-point weights
SHADES = {4: "#d3e5f5;color:#14324d", 8: "#2a73b0;color:#fff", FULL_BITS: "#0c3357;color:#fff"}
"""CSS colours of the bit-widths in notebooks, the same as in the report."""
SOLVER_SECONDS = 60.0  # time limit of one knapsack; 120 groups take 0.1 s (2026-11)
MAX_EXCLUDED = 64  # most plans excluded one by one because they exceed the budget by less than HiGHS's tolerance


@contextmanager
def _native_output_dropped() -> Iterator[None]:
    """Discard stdout of native code: HiGHS (scipy 1.18) prints a debugging line, which would spoil JSON output."""
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
class LinearShape:
    """Name (full module path) and weight shape ``(rows, columns)`` of a linear layer."""

    name: str
    rows: int
    columns: int

    @property
    def num_weights(self) -> int:
        """Return the number of weights of the layer."""
        return self.rows * self.columns


def packed_bytes(linear: LinearShape, bits: int, element_bytes: int, double_quant: bool) -> int:
    """Count the bytes of the packed weight of one linear layer, with scales and code tables, without bias.

    4 bits are NF4 of bitsandbytes (QLoRA, arXiv 2305.14314, section 3), 8 bits are LLM.int8() (arXiv 2208.07339), and
    at 16 bits each weight takes `element_bytes`.
    """
    if bits == FULL_BITS:
        return linear.num_weights * element_bytes
    if bits == 8:
        return linear.num_weights + 4 * linear.rows
    num_scales = math.ceil(linear.num_weights / NF4_BLOCK_SIZE)
    codes_and_table = math.ceil(linear.num_weights / 2) + 16 * 4
    if not double_quant:
        return codes_and_table + 4 * num_scales
    num_nested = math.ceil(num_scales / NESTED_BLOCK_SIZE)
    return codes_and_table + num_scales + 4 * num_nested + 256 * 4


def budget_text(plan_bytes: int, budget_bytes: int) -> str:
    """Compare a plan with the budget in words: `0.75 MB left of the budget of 127.11 MB`, or `0.75 MB above ...`."""
    left = (budget_bytes - plan_bytes) / 1e6
    return f"{abs(left):.2f} MB {'left of' if left >= 0 else 'above'} the budget of {budget_bytes / 1e6:.2f} MB"


WRONGLY_DECODED = "and on a CPU bitsandbytes decodes 4-bit weights wrongly if that is a multiple of 16 but not of 64"


def check_cpu_widths(linears: Iterable[LinearShape]) -> None:
    """Raise `UserError` for a layer with a number of columns that bitsandbytes at 4 bits decodes wrongly on a CPU."""
    for linear in linears:
        if decodes_wrongly(linear.columns):
            raise UserError(
                f"`quantize.bits`: {linear.name} has {linear.columns} columns, {WRONGLY_DECODED}: set "
                "`quantize.bits: [8, 16]`; or, if pruning made this width, set `prune.round_to: 64` for a layer that "
                "reads MLP channels, `prune.units: [mlp]` for one that reads attention heads"
            )


def decodes_wrongly(columns: int) -> bool:
    """Return True if the CPU kernel of bitsandbytes applies the wrong scales to 4-bit weights with this many columns.

    The relative error of random weights is then 0.25 instead of 0.09 (bitsandbytes 0.50.2 on AVX512).
    """
    return columns % 16 == 0 and columns % NF4_BLOCK_SIZE != 0


@dataclass(frozen=True)
class Group:
    """Linear layers that share one bit-width."""

    name: str
    linears: tuple[LinearShape, ...]

    @property
    def num_weights(self) -> int:
        """Return the number of weights of all its layers."""
        return sum(linear.num_weights for linear in self.linears)


@dataclass(frozen=True)
class PrecisionPlan:
    """A bit-width for every group of a model; hashable."""

    groups: tuple[str, ...]  # names, in model order
    bits: tuple[int, ...]  # 4, 8 or 16 for each group

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.bits):
            raise ValueError(f"{len(self.groups)} groups but {len(self.bits)} bit-widths")

    @classmethod
    def from_dict(cls, bits: Mapping[str, int]) -> PrecisionPlan:
        """Make a plan from a mapping of groups to bits."""
        # Interned to save memory: a searcher keeps every plan, and each record would have its own copy of the names.
        return cls(tuple(sys.intern(name) for name in bits), tuple(int(value) for value in bits.values()))

    def as_dict(self) -> dict[str, int]:
        """Return the plan as a mapping of groups to bits."""
        return dict(zip(self.groups, self.bits, strict=True))

    def _repr_html_(self) -> str:
        style = "display:inline-block;width:1.6em;text-align:center;margin:1px;background:"
        return "".join(
            f'<span title="{html.escape(group)}" style="{style}{SHADES[bits]}">{bits}</span>'
            for group, bits in zip(self.groups, self.bits, strict=True)
        )

    def __str__(self) -> str:
        """Return the plan as one character per group: ``4``, ``8``, or ``F`` for 16 bits."""
        return "".join({4: "4", 8: "8", FULL_BITS: "F"}[value] for value in self.bits)


@dataclass(frozen=True)
class Layout:
    """The groups of a model, and the sizes of everything that is the same in all plans."""

    groups: tuple[Group, ...]  # in model order
    ungrouped_bytes: int  # embeddings, head, norms and biases, which are never quantized
    adapter_bytes: int  # LoRA matrices, which peft keeps in float32
    element_bytes: int  # bytes of one unquantized weight
    double_quant: bool  # whether the scales of 4-bit weights are quantized too
    num_parameters: int  # without adapters

    def uniform(self, bits: int) -> PrecisionPlan:
        """Return the plan with every group at `bits`."""
        return PrecisionPlan(tuple(group.name for group in self.groups), (bits,) * len(self.groups))

    def group_bytes(self, bits: int) -> list[int]:
        """Return the bytes of each group at `bits`, in model order."""
        each = (self.element_bytes, self.double_quant)
        return [sum(packed_bytes(linear, bits, *each) for linear in group.linears) for group in self.groups]

    def plan_bytes(self, plan: PrecisionPlan) -> int:
        """Count the bytes of the whole model under `plan`: packed groups, unquantized rest and adapters."""
        sizes = {bits: self.group_bytes(bits) for bits in set(plan.bits)}
        return sum(sizes[bits][at] for at, bits in enumerate(plan.bits)) + self.ungrouped_bytes + self.adapter_bytes

    def mean_bits(self, plan: PrecisionPlan) -> float:
        """Return the average bits of a weight in a group; scales and weights outside groups do not count."""
        total = sum(group.num_weights for group in self.groups)
        return sum(group.num_weights * bits for group, bits in zip(self.groups, plan.bits, strict=True)) / total


@dataclass(frozen=True)
class PlanSpace:
    """All plans of a model that fit into a byte budget; this is all that a searcher knows about the model."""

    groups: tuple[str, ...]  # names, in model order
    levels: tuple[int, ...]  # bit-widths, ascending
    group_bytes: tuple[tuple[int, ...], ...]  # (groups, levels)
    fixed_bytes: int  # the same in all plans
    budget_bytes: int

    @classmethod
    def of(cls, layout: Layout, levels: tuple[int, ...], budget_bytes: int) -> PlanSpace:
        """Make the plan space of a model with these bit-widths and this budget."""
        groups = tuple(group.name for group in layout.groups)
        group_bytes = tuple(zip(*(layout.group_bytes(bits) for bits in levels), strict=True))
        return cls(groups, levels, group_bytes, layout.ungrouped_bytes + layout.adapter_bytes, budget_bytes)

    def uniform(self, bits: int) -> PrecisionPlan:
        """Return the plan with every group at `bits`."""
        return PrecisionPlan(self.groups, (bits,) * len(self.groups))

    def plan_of(self, indices: Iterable[int]) -> PrecisionPlan:
        """Return the plan in which each group has the bit-width at its index in `levels`."""
        return PrecisionPlan(self.groups, tuple(self.levels[int(index)] for index in indices))

    def indices_of(self, plan: PrecisionPlan) -> tuple[int, ...]:
        """Return the index in `levels` of each group's bit-width."""
        return tuple(self.levels.index(bits) for bits in plan.bits)

    def plan_bytes(self, plan: PrecisionPlan) -> int:
        """Count the bytes of the whole model under `plan`."""
        grouped = sum(sizes[level] for sizes, level in zip(self.group_bytes, self.indices_of(plan), strict=True))
        return grouped + self.fixed_bytes

    def is_feasible(self, plan: PrecisionPlan) -> bool:
        """Return True if the plan fits into the budget."""
        return self.plan_bytes(plan) <= self.budget_bytes

    def best_by_gain(self, gains: Sequence[Sequence[float]]) -> PrecisionPlan:
        """Return the plan in the budget with the largest sum of `gains` ``(groups, levels)``, by an exact knapsack.

        Raise `ValueError` if no plan fits into the budget, and `SolverFailed` if the solver ends without an answer.
        """
        plan = self._solve(gains, avoid=())
        if plan is None:
            raise ValueError(f"no plan fits in {self.budget_bytes} bytes")
        return plan

    def nearest_feasible(self, plan: PrecisionPlan, avoid: Iterable[PrecisionPlan] = ()) -> PrecisionPlan | None:
        """Return the plan that fits into the budget, is not in `avoid`, and differs from `plan` in the fewest groups.

        Of equally near plans the one with the most bytes is returned; None if no plan is left.
        """
        avoided = set(avoid)
        if self.is_feasible(plan) and plan not in avoided:
            return plan
        # The byte terms of all groups sum to less than one, so they only break ties between equally near plans.
        limit = 1.0 + sum(max(sizes) for sizes in self.group_bytes)
        gains = [
            [(1.0 if level == wanted else 0.0) + size / limit for level, size in zip(self.levels, sizes, strict=True)]
            for wanted, sizes in zip(plan.bits, self.group_bytes, strict=True)
        ]
        # Excluding plans makes the problem larger, and most proposals do not need it: solve it without them first.
        found = self._solve(gains, ())
        return self._solve(gains, avoided) if found in avoided else found

    def _solve(self, gains: Sequence[Sequence[float]], avoid: Iterable[PrecisionPlan]) -> PrecisionPlan | None:
        """Return the plan in the budget, not in `avoid`, with the largest sum of gains; None if there is no such plan.

        HiGHS accepts plans that exceed the budget by up to a millionth of it. If it returns one, it is run again with
        a slightly smaller budget. If that does not help, plans over the budget are excluded one by one.
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
        """Solve the knapsack for plans not in `avoid`, with the share `margin` of the budget unused; None if none."""
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp

        gain = np.asarray(gains, dtype=float)
        num_groups, num_levels = gain.shape
        sizes = np.array(self.group_bytes, dtype=float)
        capacity = float(self.budget_bytes - self.fixed_bytes)
        budget = LinearConstraint(sizes.ravel()[None, :] / max(capacity, 1.0), -np.inf, 1.0 - margin)
        constraints = [LinearConstraint(np.kron(np.eye(num_groups), np.ones(num_levels)), 1, 1)]
        excluded = [[bits == level for bits in other.bits for level in self.levels] for other in avoid]
        if excluded:
            constraints.append(LinearConstraint(np.array(excluded, dtype=float), -np.inf, num_groups - 1))
        with _native_output_dropped():
            solution = milp(
                c=-gain.ravel(),
                constraints=[*constraints, budget],
                integrality=np.ones(gain.size),
                bounds=Bounds(0, 1),
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


def read_plan(path: Path, groups: Sequence[str], levels: Sequence[int]) -> PrecisionPlan:
    """Read a plan file (see `--plan`), YAML or JSON: a mapping of groups to bits, alone or under the key `plan`.

    Raise `PlanRefused` with all problems: a group is unknown or missing, or its bit-width is not among `levels`.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanRefused(f"{path} does not exist: write one with `qpruner plan RUN > {path.name}`") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanRefused(f"{path} is no readable YAML or JSON: {error}; `qpruner plan RUN` prints a plan") from error
    bits = raw.get("plan", raw) if isinstance(raw, dict) else raw
    if not isinstance(bits, dict):
        got = "an empty file" if raw is None else type(bits).__name__
        raise PlanRefused(f"{path} must map every group to its bits, got {got}; `qpruner plan RUN` prints a plan")
    if problems := _problems(bits, groups, levels):
        raise PlanRefused(f"{path} is not a valid plan for this model:\n" + "\n".join(f"  - {p}" for p in problems))
    return PrecisionPlan(tuple(groups), tuple(int(bits[group]) for group in groups))


def _problems(bits: dict[Any, Any], groups: Sequence[str], levels: Sequence[int]) -> list[str]:
    problems, allowed = [], ", ".join(map(str, levels))
    for name, value in bits.items():
        if name not in groups:
            nearest = difflib.get_close_matches(str(name), groups, n=1)
            hint = f"did you mean `{nearest[0]}`?" if nearest else f"the groups are {groups[0]} to {groups[-1]}"
            problems.append(f"`{name}` is not a group of this model; {hint}")
        elif isinstance(value, bool) or value not in levels:
            problems.append(f"`{name}` must have one of {allowed} bits (`quantize.bits`), got {value!r}")
    missing = [name for name in groups if name not in bits]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        remedy = "; `qpruner plan RUN` prints a plan with all groups" if len(missing) > len(groups) / 2 else ""
        problems.append(f"{len(missing)} of {len(groups)} groups are missing: {named}{remedy}")
    return problems
