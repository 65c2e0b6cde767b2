"""A plan in a file: made by hand, or printed by `qpruner plan`, and read back by `--plan`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qpruner.config.load import parse_yaml
from qpruner.errors import PlanRefused
from qpruner.plans.plan import PrecisionPlan


def read_plan(path: Path, groups: Sequence[str], levels: Sequence[int]) -> PrecisionPlan:
    """Read a plan: YAML or JSON with bits by group, or an object with such a mapping under `plan`.

    Raises:
        PlanRefused: With every problem found: each of the model's `groups` must have one of `levels`, and no other.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanRefused(f"{path} does not exist; `qpruner plan RUN > {path.name}` makes one") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanRefused(f"{path} cannot be read as YAML or JSON: {error}; `qpruner plan RUN` prints one") from error
    bits = raw.get("plan", raw) if isinstance(raw, dict) else raw
    if not isinstance(bits, dict):
        got = "an empty file" if raw is None else type(bits).__name__
        raise PlanRefused(f"{path} must map every group to its bits, got {got}; `qpruner plan RUN` prints one")
    if problems := _problems(bits, groups, levels):
        raise PlanRefused(f"{path} is no plan for this model:\n" + "\n".join(f"  - {p}" for p in problems))
    return PrecisionPlan(tuple(groups), tuple(int(bits[group]) for group in groups))


def check_affordable(path: Path, plan_bytes: int, budget_bytes: int) -> None:
    """Refuse a file's plan over the budget."""
    if plan_bytes > budget_bytes:
        over = math.ceil((plan_bytes - budget_bytes) / 100) / 1e4
        raise PlanRefused(
            f"the plan in {path} takes {plan_bytes / 1e6:.2f} MB, {over:.4f} MB more than the budget of "
            f"{budget_bytes / 1e6:.2f} MB: give groups fewer bits, or raise `quantize.budget`"
        )


def _problems(bits: dict[Any, Any], groups: Sequence[str], levels: Sequence[int]) -> list[str]:
    problems, allowed = [], ", ".join(map(str, levels))
    for name, value in bits.items():
        if name not in groups:
            nearest = difflib.get_close_matches(str(name), groups, n=1)
            hint = f"did you mean `{nearest[0]}`?" if nearest else f"they are {groups[0]} to {groups[-1]}"
            problems.append(f"`{name}` is no group of this model; {hint}")
        elif isinstance(value, bool) or value not in levels:
            problems.append(f"`{name}` must have one of {allowed} bits (`quantize.bits`), got {value!r}")
    missing = [name for name in groups if name not in bits]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        whole = "; `qpruner plan RUN` prints one with all" if len(missing) > len(groups) / 2 else ""
        problems.append(f"{len(missing)} of {len(groups)} groups are missing: {named}{whole}")
    return problems
