"""Precision plans, the groups they are about, and their bytes: plain data, without torch."""

from __future__ import annotations

import ctypes
import html
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from qpruner.errors import SolverFailed, UserError

NF4_BLOCK_SIZE = 64  # weights that share one absmax scale
NESTED_BLOCK_SIZE = 256  # scales that share one nested scale under double quantization
FULL_BITS = 16  # keeps the model's own floating-point weights
SHADES = {4: "#d3e5f5;color:#14324d", 8: "#2a73b0;color:#fff", FULL_BITS: "#0c3357;color:#fff"}
"""Colours of the bit-widths in notebooks, as in the report."""
SOLVER_SECONDS = 60.0  # for one knapsack; 120 groups take 0.1 s (2026-11)
MAX_EXCLUDED = 64  # plans over the budget by less than the solver's tolerance, excluded one by one


@contextmanager
def _native_output_dropped() -> Iterator[None]:
    """Drop what native code prints: HiGHS (scipy 1.18) has a debugging line, which would follow the JSON on stdout."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class LinearShape:
    """A linear layer's weight: ``name`` is the module's full path, the weight is ``(rows, columns)``."""

    name: str
    rows: int
    columns: int

    @property
    def num_weights(self) -> int:
        """Count the weights."""
        return self.rows * self.columns


def packed_bytes(linear: LinearShape, bits: int, element_bytes: int, double_quant: bool) -> int:
    """Count the bytes of one linear layer's packed weight, with scales and code tables, without bias.

    At 4 bits they are NF4's of bitsandbytes (QLoRA, arXiv 2305.14314, section 3), at 8 those of LLM.int8() (arXiv
    2208.07339); at 16 each weight has `element_bytes`.
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
    """Describe what is left: `0.75 MB left of the budget of 127.11 MB`, or above it."""
    left = (budget_bytes - plan_bytes) / 1e6
    return f"{abs(left):.2f} MB {'left of' if left >= 0 else 'above'} the budget of {budget_bytes / 1e6:.2f} MB"


WRONGLY_DECODED = "and on a CPU bitsandbytes decodes 4-bit weights wrongly where that is a multiple of 16 but not of 64"


def check_cpu_widths(linears: Iterable[LinearShape]) -> None:
    """Refuse a 4-bit layer of a width that bitsandbytes' CPU kernel decodes wrongly."""
    for linear in linears:
        if decodes_wrongly(linear.columns):
            raise UserError(
                f"`quantize.bits`: {linear.name} has {linear.columns} columns, {WRONGLY_DECODED}: use bits 8 and 16, "
                "or, if it is a cut that leaves this width, have it leave another: `prune.round_to: 64` for MLP "
                "channels, `prune.units: [mlp]` where the size of heads is no multiple of 64"
            )


def decodes_wrongly(columns: int) -> bool:
    """Return whether bitsandbytes' CPU kernel takes scales of the wrong blocks for 4-bit weights of this width.

    A random weight's relative error is then 0.25 instead of 0.09 (bitsandbytes 0.50.2 on AVX512).
    """
    return columns % 16 == 0 and columns % NF4_BLOCK_SIZE != 0


@dataclass(frozen=True)
class Group:
    """Linear layers that share one bit-width."""

    name: str
    linears: tuple[LinearShape, ...]

    @property
    def num_weights(self) -> int:
        """Count the weights."""
        return sum(linear.num_weights for linear in self.linears)


@dataclass(frozen=True)
class PrecisionPlan:
    """A bit-width for every group; hashable."""

    groups: tuple[str, ...]  # names, in model order
    bits: tuple[int, ...]  # 4, 8 or 16 for each group

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.bits):
            raise ValueError(f"{len(self.groups)} groups but {len(self.bits)} bit-widths")

    @classmethod
    def from_dict(cls, bits: Mapping[str, int]) -> PrecisionPlan:
        """Make a plan from bits by group."""
        # Interned: a searcher keeps every plan, and each record has its own copy of the names.
        return cls(tuple(sys.intern(name) for name in bits), tuple(int(value) for value in bits.values()))

    def as_dict(self) -> dict[str, int]:
        """Return bits by group."""
        return dict(zip(self.groups, self.bits, strict=True))

    def _repr_html_(self) -> str:
        """Render for notebooks: a shaded cell for each group."""
        style = "display:inline-block;width:1.6em;text-align:center;margin:1px;background:"
        return "".join(
            f'<span title="{html.escape(group)}" style="{style}{SHADES[bits]}">{bits}</span>'
            for group, bits in zip(self.groups, self.bits, strict=True)
        )

    def __str__(self) -> str:
        """Return the plan as a short bar: one character a group (``4``, ``8``, ``F`` for 16)."""
        return "".join({4: "4", 8: "8", FULL_BITS: "F"}[value] for value in self.bits)


@dataclass(frozen=True)
class Layout:
    """The groups of one model and the bytes that no plan changes."""

    groups: tuple[Group, ...]  # in model order
    ungrouped_bytes: int  # embeddings, head, norms, biases: what stays unquantized
    adapter_bytes: int  # LoRA matrices in float32, as peft keeps them beside quantized weights
    element_bytes: int  # of one unquantized weight
    double_quant: bool  # whether 4-bit scales are quantized themselves
    num_parameters: int  # without adapters

    def uniform(self, bits: int) -> PrecisionPlan:
        """Return the plan with every group at `bits`."""
        return PrecisionPlan(tuple(group.name for group in self.groups), (bits,) * len(self.groups))

    def group_bytes(self, bits: int) -> list[int]:
        """Return the bytes of each group at ``bits``, in model order."""
        each = (self.element_bytes, self.double_quant)
        return [sum(packed_bytes(linear, bits, *each) for linear in group.linears) for group in self.groups]

    def plan_bytes(self, plan: PrecisionPlan) -> int:
        """Count the bytes of the whole model under ``plan``: packed groups, unquantized rest, adapters."""
        sizes = {bits: self.group_bytes(bits) for bits in set(plan.bits)}
        return sum(sizes[bits][at] for at, bits in enumerate(plan.bits)) + self.ungrouped_bytes + self.adapter_bytes

    def mean_bits(self, plan: PrecisionPlan) -> float:
        """Return the nominal bits per grouped weight (scales and the unquantized rest not counted)."""
        total = sum(group.num_weights for group in self.groups)
        return sum(group.num_weights * bits for group, bits in zip(self.groups, plan.bits, strict=True)) / total


@dataclass(frozen=True)
class PlanSpace:
    """All plans inside a byte budget: what a searcher knows of a model."""

    groups: tuple[str, ...]  # names, in model order
    levels: tuple[int, ...]  # bit-widths, ascending
    group_bytes: tuple[tuple[int, ...], ...]  # (groups, levels)
    fixed_bytes: int  # that no plan changes
    budget_bytes: int

    @classmethod
    def of(cls, layout: Layout, levels: tuple[int, ...], budget_bytes: int) -> PlanSpace:
        """Return the plans of a model that stay inside a budget."""
        by_level = [layout.group_bytes(bits) for bits in levels]
        return cls(
            groups=tuple(group.name for group in layout.groups),
            levels=levels,
            group_bytes=tuple(zip(*by_level, strict=True)),
            fixed_bytes=layout.ungrouped_bytes + layout.adapter_bytes,
            budget_bytes=budget_bytes,
        )

    def uniform(self, bits: int) -> PrecisionPlan:
        """Return the plan with every group at `bits`."""
        return PrecisionPlan(self.groups, (bits,) * len(self.groups))

    def plan_of(self, indices: Iterable[int]) -> PrecisionPlan:
        """Return the plan that gives each group the level of that index."""
        return PrecisionPlan(self.groups, tuple(self.levels[int(index)] for index in indices))

    def indices_of(self, plan: PrecisionPlan) -> tuple[int, ...]:
        """Return the index of each group's level."""
        return tuple(self.levels.index(bits) for bits in plan.bits)

    def plan_bytes(self, plan: PrecisionPlan) -> int:
        """Count the bytes of the whole model under `plan`."""
        grouped = sum(sizes[level] for sizes, level in zip(self.group_bytes, self.indices_of(plan), strict=True))
        return grouped + self.fixed_bytes

    def is_feasible(self, plan: PrecisionPlan) -> bool:
        """Return whether a plan is inside the budget."""
        return self.plan_bytes(plan) <= self.budget_bytes

    def best_by_gain(self, gains: Sequence[Sequence[float]]) -> PrecisionPlan:
        """Return the feasible plan with the largest sum of `gains` ``(groups, levels)``; `ValueError` if none fits.

        It is a multiple-choice knapsack, solved exactly. `SolverFailed` if the solver ended without an answer.
        """
        plan = self._solve(gains, avoid=())
        if plan is None:
            raise ValueError(f"no plan fits {self.budget_bytes} bytes")
        return plan

    def nearest_feasible(self, plan: PrecisionPlan, avoid: Iterable[PrecisionPlan] = ()) -> PrecisionPlan | None:
        """Return the feasible plan not in `avoid` that agrees with `plan` in the most groups; None if there is none.

        Ties go to the plan that keeps more bytes.
        """
        known = set(avoid)
        if self.is_feasible(plan) and plan not in known:
            return plan
        # The byte term sums to less than one over all groups, so it only breaks ties between equal agreements.
        whole = 1.0 + sum(max(sizes) for sizes in self.group_bytes)
        gains = [
            [(1.0 if level == wanted else 0.0) + size / whole for level, size in zip(self.levels, sizes, strict=True)]
            for wanted, sizes in zip(plan.bits, self.group_bytes, strict=True)
        ]
        # Known plans become rows of the problem; most repairs need none.
        found = self._solve(gains, ())
        return self._solve(gains, known) if found in known else found

    def _solve(self, gains: Sequence[Sequence[float]], avoid: Iterable[PrecisionPlan]) -> PrecisionPlan | None:
        """Maximize the summed gain under the budget, without the plans of ``avoid``; None if there is no plan.

        HiGHS accepts a row that is violated by up to 1e-6. A plan over the budget is solved with a margin; if only
        plans within it are left, they are excluded one by one.
        """
        known = list(avoid)
        for margin in (0.0, 2e-6, 2e-5):
            plan = self._optimum(gains, known, margin)
            if plan is None and margin == 0.0:
                return None
            if plan is not None and self.is_feasible(plan):
                return plan
        for _ in range(MAX_EXCLUDED):
            plan = self._optimum(gains, known, margin=0.0)
            if plan is None or self.is_feasible(plan):
                return plan
            known.append(plan)
        raise SolverFailed(
            f"HiGHS found {MAX_EXCLUDED} plans over {self.budget_bytes} bytes within its tolerance of a millionth: "
            "raise `quantize.budget` by as much, or take fewer groups (`quantize.group`)"
        )

    def _optimum(
        self, gains: Sequence[Sequence[float]], avoid: Sequence[PrecisionPlan], margin: float
    ) -> PrecisionPlan | None:
        """Solve with HiGHS; None where it proves that there is no plan."""
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp

        gain = np.asarray(gains, dtype=float)
        num_groups, num_levels = gain.shape
        sizes = np.array(self.group_bytes, dtype=float)
        capacity = float(self.budget_bytes - self.fixed_bytes)
        budget = LinearConstraint(sizes.ravel()[None, :] / max(capacity, 1.0), -np.inf, 1.0 - margin)
        constraints = [LinearConstraint(np.kron(np.eye(num_groups), np.ones(num_levels)), 1, 1)]
        known = [[bits == level for bits in other.bits for level in self.levels] for other in avoid]
        if known:
            constraints.append(LinearConstraint(np.array(known, dtype=float), -np.inf, num_groups - 1))
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
                f"no plan of {num_groups} groups inside {self.budget_bytes} bytes was found or ruled out: HiGHS ended "
                f"with status {solution.status} ({solution.message}); its limit is {SOLVER_SECONDS:g} s: try again, or "
                "take fewer groups (`quantize.group`)"
            )
        return self.plan_of(solution.x.reshape(num_groups, num_levels).argmax(axis=1))
