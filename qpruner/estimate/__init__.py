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
from qpruner.report.lines import duration
from qpruner.wording import counted


def facts(
    config: RunConfig, inspection: Inspection, rates: Rates, slots: int, done: Mapping[str, float], gpus: float | None
) -> dict[str, Any]:
    """Every figure as plain data.

    Args:
        config: The run's configuration.
        inspection: Shapes, rows and questions.
        rates: Of a whole GPU, or of a slot without one.
        slots: Trials at once.
        done: How much of each stage is recorded, from 0 to 1.
        gpus: What each slot holds, whose hours are counted; None counts those of slots.
    """
    works = {
        "trial, training": training_memory,
        "trial, scoring": scoring_memory,
        "prune": prune_memory,
        "sensitivity": sensitivity_memory,
    }
    memory = {name: work(config, inspection) for name, work in works.items()}
    held = 1.0 if gpus is None else gpus
    rates = rates.on(held)
    time = hours(config, inspection, rates, slots, done)
    return {
        "memory": {name: {"at": each.about, "parts": each.parts, "total": each.total} for name, each in memory.items()},
        "hours": {
            "rates": rates.origin,
            "stages": {name: held * each for name, each in time.stages.items()},
            "share_done": {name: done.get(name, 0.0) for name in time.stages},
            "total": held * time.total,
            "done": held * time.done,
            "at_most": held * time.at_most,
            "wall": time.wall,
            "wall_left": time.wall_left,
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
    taken = {name: duration(3600 * hours) for name, hours in time.items() if isinstance(hours, float)}
    done = f", {taken['done']} of it done" if time["done"] else ""
    left = f", {taken['wall_left']} of it left" if time["done"] else ""
    lines.append(
        f"time of {'GPUs' if has_gpu else 'slots'}: {taken['total']}{done} (at most {taken['at_most']}, with no trial "
        f"stopped); on {counted(time['slots'], 'slot')} about {taken['wall']}{left}:"
    )
    for stage, each in time["stages"].items():
        share = time["share_done"][stage]
        lines.append(f"    {stage:<12} {duration(3600 * each):>12}{f', {share:.0%} done' if share else ''}")
    lines.append(
        f"    {time['rates']}; rows of {CHARACTERS_A_TOKEN} characters a token, {CHOICES} answers a question; without "
        "starts of processes, loading and saving"
    )
    return lines


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
