"""What a run will take, before it is paid for: memory by part, and hours by stage.

Nothing is loaded or run here. The speed of a slot is assumed, or what `qpruner.pace` measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpruner.config import RunConfig
from qpruner.estimate.memory import prune_memory, scoring_memory, sensitivity_memory, training_memory
from qpruner.estimate.work import CHARACTERS_A_TOKEN, CHOICES, Rates, hours
from qpruner.preflight import Inspection


def facts(config: RunConfig, inspection: Inspection, rates: Rates, slots: int) -> dict[str, Any]:
    """Every figure as plain data."""
    works = {
        "trial, training": training_memory,
        "trial, scoring": scoring_memory,
        "prune": prune_memory,
        "sensitivity": sensitivity_memory,
    }
    memory = {name: work(config, inspection) for name, work in works.items()}
    time = hours(config, inspection, rates, slots)
    return {
        "memory": {name: {"at": each.about, "parts": each.parts, "total": each.total} for name, each in memory.items()},
        "hours": {
            "rates": rates.origin,
            "stages": time.stages,
            "total": time.total,
            "at_most": time.at_most,
            "wall": time.wall,
            "slots": slots,
        },
    }


def text(found: Mapping[str, Any], has_gpu: bool) -> list[str]:
    """The same as lines."""
    lines = []
    for name, each in found["memory"].items():
        lines.append(f"memory, {name}: {_amount(each['total'])} at most ({each['at']})")
        lines += [f"    {part:<12} {_amount(size):>10}" for part, size in each["parts"].items()]
    time = found["hours"]
    unit = "GPU hours" if has_gpu else "slot hours"
    lines.append(
        f"time, {time['total']:.2f} {unit} (at most {time['at_most']:.2f}, with no trial stopped), about "
        f"{time['wall']:.2f} hours on {time['slots']} slot(s):"
    )
    lines += [f"    {stage:<12} {taken:>10.3f}" for stage, taken in time["stages"].items()]
    lines.append(
        f"    {time['rates']}; rows of {CHARACTERS_A_TOKEN} characters a token, {CHOICES} answers a question; without "
        "starts of processes, loading and saving"
    )
    return lines


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
