"""Define precision plans, groups and their sizes, and read a plan file; without torch."""

from __future__ import annotations

import difflib
import html
import itertools
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from qpruner.config.load import parse_yaml
from qpruner.config.pruning import UNPRUNED as UNPRUNED
from qpruner.errors import PlanRefused
from qpruner.quantization.formats import (
    ALIASES,
    DENSE,
    Method,
    ScaledFormat,
    by_size,
    format_of,
    trained_by,
)
from qpruner.runs.records import Finalist, FineTune, TrialRecord

EMBEDDINGS = "embeddings"
HEAD = "head"
OUTSIDE_BLOCKS = (EMBEDDINGS, HEAD)
"""Names of the groups outside the blocks; there is no head group if the head is tied to the
embeddings."""


@dataclass(frozen=True)
class LinearShape:
    """Hold the module path and weight shape ``(rows, columns)`` of a linear layer or embedding."""

    name: str
    rows: int
    columns: int

    @property
    def num_weights(self) -> int:
        """Return the number of weights of the layer."""
        return self.rows * self.columns


def cut_title(cut: str) -> str:
    """Name a cut for people, such as `10 % pruned`."""
    if cut == UNPRUNED:
        return "not pruned"
    kind, _, percent = cut.partition("-")
    return f"{percent} % of each block pruned" if kind == "layers" else f"{percent} % pruned"


def formats_text(plan: Mapping[str, str]) -> str:
    """Describe a plan in short, such as `40 nf4, 20 int8, embeddings q8_0`.

    If all groups in blocks have one format, they are described by it alone: `nf4`.
    """
    counts = Counter(name for group, name in plan.items() if group not in OUTSIDE_BLOCKS)
    parts = list(counts)
    if len(counts) > 1:
        parts = [f"{counts[name]} {name}" for name in by_size(tuple(counts))]
    parts += [f"{group} {plan[group]}" for group in OUTSIDE_BLOCKS if group in plan]
    return ", ".join(parts)


def budget_text(plan_bytes: int, budget_bytes: int) -> str:
    """Compare the bytes of a plan with the budget in words.

    Examples are `0.75 MB left of the budget of 127.11 MB` and `0.75 MB above the budget of ...`.
    """
    left = (budget_bytes - plan_bytes) / 1e6
    where = "left of" if left >= 0 else "above"
    return f"{abs(left):.2f} MB {where} the budget of {budget_bytes / 1e6:.2f} MB"


@dataclass(frozen=True)
class Group:
    """Layers that share one format."""

    name: str
    linears: tuple[LinearShape, ...]
    formats: tuple[str, ...]  # that are offered, smallest first; all its layers take them

    @property
    def is_table(self) -> bool:
        """Whether this is the group of the embeddings or of the head, outside the blocks."""
        return self.name in OUTSIDE_BLOCKS

    @property
    def packed(self) -> tuple[str, ...]:
        """Those of `formats` in which weights are packed."""
        return tuple(name for name in self.formats if format_of(name).is_packed)

    @property
    def num_weights(self) -> int:
        """Return the number of weights of all its layers."""
        return sum(linear.num_weights for linear in self.linears)

    def num_scales(self, name: str) -> int:
        """Count the scales and minima that a format stores and that can be trained."""
        stored = format_of(name)
        if not isinstance(stored, ScaledFormat):
            return 0
        num_groups = sum(item.num_weights for item in self.linears) // stored.group_size
        return num_groups * stored.num_scales

    def packed_bytes(self, name: str, element_bytes: int) -> int:
        """Count the bytes of its weights in a format, offered or not, without biases."""
        packed_bytes = format_of(name).packed_bytes
        return sum(packed_bytes(item.rows, item.columns, element_bytes) for item in self.linears)


@dataclass(frozen=True)
class PrecisionPlan:
    """A format for every group of a model; hashable."""

    groups: tuple[str, ...]  # names, in model order
    formats: tuple[str, ...]  # one for each group
    cut: str = UNPRUNED  # the cut whose groups these are

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.formats):
            raise ValueError(f"{len(self.groups)} groups but {len(self.formats)} formats")

    @classmethod
    def from_dict(cls, formats: Mapping[str, str], cut: str = UNPRUNED) -> PrecisionPlan:
        """Make a plan from a mapping of groups to formats."""
        # Interned to save memory: a searcher keeps every plan, and each record would have its own
        # copy of the names.
        return cls(
            tuple(map(sys.intern, formats)),
            tuple(map(sys.intern, formats.values())),
            sys.intern(cut),
        )

    def as_dict(self) -> dict[str, str]:
        """Return the plan as a mapping of groups to formats."""
        return dict(zip(self.groups, self.formats, strict=True))

    @property
    def runs(self) -> list[tuple[str, tuple[str, ...]]]:
        """The plan as it is drawn: each format with the neighbouring groups that have it."""
        pairs = zip(self.formats, self.groups, strict=True)
        runs = []
        for name, neighbours in itertools.groupby(pairs, lambda pair: pair[0]):
            runs.append((name, tuple(group for _, group in neighbours)))
        return runs

    @property
    def bars(self) -> str:
        """Return the plan as HTML: the letter of every group's format on the format's colour."""
        spans = []
        for name, groups in self.runs:
            drawn = format_of(name)
            ends = html.escape(" to ".join(dict.fromkeys((groups[0], groups[-1]))))
            style = f"background:{drawn.colour};color:{drawn.ink}"
            letters = html.escape(drawn.letter * len(groups))
            spans.append(f'<span title="{ends}: {name}" style="{style}">{letters}</span>')
        return "".join(spans)

    def _repr_html_(self) -> str:
        return f"{self.bars} {html.escape(cut_title(self.cut))}"

    def __str__(self) -> str:
        """Return the plan as one character per group: the letter of its format."""
        return "".join(format_of(name).letter for name in self.formats)


def plan_of(record: TrialRecord | Finalist | FineTune) -> PrecisionPlan:
    """Return the plan of a record."""
    return PrecisionPlan.from_dict(record.plan, record.cut)


def in_base(groups: Sequence[str], num_blocks: int, dropped: Collection[int]) -> tuple[str, ...]:
    """Return the groups of a cut by their names in the base model of `num_blocks` blocks.

    The numbers of blocks differ after blocks were `dropped`.
    """
    kept = sorted(set(range(num_blocks)) - set(dropped))
    num_digits = len(str(num_blocks - 1))

    def number_in_base(number: re.Match[str]) -> str:
        return f"{kept[int(number[0])]:0{num_digits}d}"

    return tuple(re.sub(r"\d+", number_in_base, name, count=1) for name in groups)


def next_format(name: str, offered: Sequence[str]) -> str:
    """Return the format itself if it is offered, else the next larger one, else the largest.

    `offered` is in order of size, smallest first.
    """
    least = format_of(name).order
    larger = (candidate for candidate in offered if format_of(candidate).order >= least)
    return next(larger, offered[-1])


class PlansOfCut(ABC):
    """Make the plans of one cut from what each group takes in the formats that it is offered.

    A layout knows the weights of the groups, and a plan space the budget.
    """

    cut: str

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Return the names of the groups, in model order."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[dict[str, int], ...]:
        """Return the bytes of each group in the formats that it is offered, smallest first."""

    def plan(self, formats: Iterable[str]) -> PrecisionPlan:
        """Return the plan with these formats, in the order of the groups."""
        return PrecisionPlan(self.names, tuple(formats), self.cut)

    def uniform(self, name: str) -> PrecisionPlan:
        """Return the plan with every group in one format.

        A group that is not offered it takes its next larger one.
        """
        return self.plan(next_format(name, tuple(offered)) for offered in self.sizes)

    def smallest(self) -> PrecisionPlan:
        """Return the plan with the fewest bytes."""
        return self.plan(min(offered, key=offered.__getitem__) for offered in self.sizes)

    def largest(self) -> PrecisionPlan:
        """Return the plan with the most bytes."""
        return self.plan(max(offered, key=offered.__getitem__) for offered in self.sizes)


@dataclass(frozen=True)
class Layout(PlansOfCut):
    """Hold the groups of a model, and the sizes of everything that is the same in all plans."""

    groups: tuple[Group, ...]  # in model order
    ungrouped_bytes: int  # norms, biases and other weights in no group
    adapter_bytes: int  # LoRA matrices as they are served, see `start_bytes`
    element_bytes: int  # bytes of one unquantized weight
    num_parameters: int  # without adapters
    multiply_adds: int  # per token
    cut: str = UNPRUNED
    method: Method = "adapter"  # that trains plans which store scales

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the names of the groups, in model order."""
        return tuple(group.name for group in self.groups)

    @cached_property
    def sizes(self) -> tuple[dict[str, int], ...]:
        """Return the bytes of each group in the formats that it is offered, smallest first."""
        return tuple(
            {name: group.packed_bytes(name, self.element_bytes) for name in group.formats}
            for group in self.groups
        )

    @property
    def levels(self) -> tuple[str, ...]:
        """Return the formats that any group is offered, smallest first."""
        return by_size(set().union(*self.sizes))

    @property
    def offered(self) -> dict[str, tuple[str, ...]]:
        """Map each group to the formats it is offered."""
        return {group.name: group.formats for group in self.groups}

    @property
    def fixed_bytes(self) -> int:
        """Return the bytes of everything that is the same in all plans of a search."""
        return self.ungrouped_bytes + (self.adapter_bytes if self.method == "adapter" else 0)

    @property
    def start_bytes(self) -> int:
        """Count the bytes of the adapters in float32, as the bank keeps them."""
        return self.adapter_bytes // self.element_bytes * 4

    @property
    def trained_bytes(self) -> int:
        """Count the bytes of what is trained, in float32: the adapters, or the most scales."""
        if self.method == "adapter":
            return self.start_bytes
        return 4 * sum(max(map(group.num_scales, group.formats)) for group in self.groups)

    def dense(self) -> PrecisionPlan:
        """Return the plan with every group unpacked, whether that is offered or not."""
        return self.plan(DENSE for _ in self.groups)

    def plan_bytes(self, plan: PrecisionPlan) -> int:
        """Count the bytes of the whole model under `plan`: groups, other weights, any adapters."""
        assert plan.groups == self.names, "a plan names the groups in the model's order"
        plan_bytes = self.ungrouped_bytes
        if trained_by(self.method, plan.formats) == "adapter":
            plan_bytes += self.adapter_bytes
        for group, name in zip(self.groups, plan.formats, strict=True):
            plan_bytes += group.packed_bytes(name, self.element_bytes)
        return plan_bytes

    def mean_bits(self, plan: PrecisionPlan) -> float:
        """Return the average bits of a weight in the groups of blocks.

        Scales, embeddings and head do not count.
        """
        num_bits = 0.0
        num_weights = 0
        for group, name in zip(self.groups, plan.formats, strict=True):
            if not group.is_table:
                num_bits += group.num_weights * format_of(name).bits
                num_weights += group.num_weights
        return num_bits / num_weights


def read_plan(
    path: Path, offered: Mapping[str, Mapping[str, Sequence[str]]], only: str = ""
) -> PrecisionPlan:
    """Read a plan file (see `--plan`), in YAML or JSON.

    It is a mapping of groups to formats, alone or under the key `plan`. A key `cut` beside the
    groups or the plan names the cut; without it the cut is `only`, the single one of a run.
    `offered` has for each cut its groups with their formats (see `Layout.offered`). The bit-widths
    of `ALIASES` stand for formats; a group with a single format may be left out. Raise
    `PlanRefused` with all problems.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanRefused(
            f"{path} does not exist: write one with `qpruner plan RUN > {path.name}`"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanRefused(
            f"{path} is no readable YAML or JSON: {error}; `qpruner plan RUN` prints a plan"
        ) from error
    cut = only
    plan = content
    if isinstance(content, dict):
        cut = str(content.pop("cut", only))
        plan = content.get("plan", content)

    if cut not in offered:
        raise PlanRefused(
            f"{path} must name one of the cuts of this run that `quantize.budget` allows, got "
            f"{cut or 'none'}: `cut: NAME`, of {', '.join(offered)}"
        )
    if not isinstance(plan, dict):
        got = "an empty file" if content is None else type(plan).__name__
        raise PlanRefused(
            f"{path} must map every group to its format, got {got}; `qpruner plan RUN` prints a "
            "plan"
        )
    problems = _problems(plan, offered[cut])
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise PlanRefused(f"{path} is not a valid plan for this model:\n{listed}")

    formats = {}
    for group, levels in offered[cut].items():
        formats[group] = _format_name(plan[group]) if group in plan else levels[0]
    return PrecisionPlan.from_dict(formats, cut)


def _format_name(value: Any) -> Any:
    """Return the name of the format for a bit-width, and anything else as it is."""
    return ALIASES.get(value, value) if type(value) is int else value


def _problems(plan: Mapping[Any, Any], offered: Mapping[str, Sequence[str]]) -> list[str]:
    """Say what is wrong with a plan as it was read, for groups with the formats `offered`."""
    problems = []
    groups = list(offered)
    for group, value in plan.items():
        if group not in offered:
            nearest = difflib.get_close_matches(str(group), groups, n=1)
            hint = f"the groups are {groups[0]} to {groups[-1]}"
            if nearest:
                hint = f"did you mean `{nearest[0]}`?"
            problems.append(f"`{group}` is not a group of this model; {hint}")
        elif _format_name(value) not in offered[group]:
            key = "embeddings" if group in OUTSIDE_BLOCKS else "formats"
            among = ", ".join(offered[group])
            if len(offered[group]) > 1:
                among = f"one of {among}"
            problems.append(f"`{group}` must be {among} (`quantize.{key}`), got {value!r}")

    missing = [group for group in groups if group not in plan and len(offered[group]) > 1]
    if missing:
        shown = ", ".join(missing[:5])
        if len(missing) > 5:
            shown += ", ..."
        if len(missing) > len(groups) / 2:
            shown += "; `qpruner plan RUN` prints a plan with all groups"
        problems.append(f"{len(missing)} of {len(groups)} groups are missing: {shown}")
    return problems
