"""Read the plan file of `--plan`, which was written by hand or printed by `qpruner plan`."""

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
    """Read a plan from YAML or JSON: a mapping of groups to bits, at the top level or under the key `plan`.

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


def check_affordable(path: Path, plan_bytes: int, budget_bytes: int) -> None:
    """Raise `PlanRefused` if the plan of a file takes more bytes than the budget."""
    if plan_bytes > budget_bytes:
        excess = math.ceil((plan_bytes - budget_bytes) / 100) / 1e4
        raise PlanRefused(
            f"the plan in {path} takes {plan_bytes / 1e6:.2f} MB, {excess:.4f} MB more than the budget of "
            f"{budget_bytes / 1e6:.2f} MB: give groups fewer bits, or raise `quantize.budget`"
        )


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
