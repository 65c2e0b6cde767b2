"""What a run will take, before it is paid for: memory by part, and hours by stage.

Nothing is loaded or run here. The speed of a slot is assumed, or what `qpruner.estimate.step_times` measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.estimate.memory import (
    Memory,
    comparison_memory,
    prune_memory,
    scoring_memory,
    sensitivity_memory,
    training_memory,
)
from qpruner.estimate.work import CHOICES, Rates, hours, num_compared
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import CHARACTERS_A_TOKEN
from qpruner.wording import counted, duration


def facts(
    config: RunConfig, inspection: Inspection, rates: Rates, slots: int, done: Mapping[str, float], gpus: float | None
) -> dict[str, Any]:
    """Every figure as plain data.

    Args:
        config: The run's configuration.
        inspection: Shapes, rows and questions.
        rates: Of a whole GPU, or of a slot without one.
        slots: Trials, or fine-tunes, at once.
        done: How much of each stage is recorded, from 0 to 1.
        gpus: What each slot holds, whose hours are counted; None counts those of slots.
    """
    memory = {name: work(config, inspection) for name, work in works(config).items()}
    held = 1.0 if gpus is None else gpus
    sharing = slots if gpus is None else max(1, int(1 / gpus))
    in_slots = ("trial", "comparison")
    at_once = {name: each.total * (sharing if name.startswith(in_slots) else 1) for name, each in memory.items()}
    rates = rates.on(held)
    time = hours(config, inspection, rates, slots, done, has_gpus=gpus is not None)
    return {
        "memory": {name: {"at": each.about, "parts": each.parts, "total": each.total} for name, each in memory.items()},
        "memory_at_once": max(at_once.values()),
        "trials_sharing_memory": sharing,
        "hours": {
            "rates": rates.origin,
            "busy": rates.busy,
            "stages": {name: held * each for name, each in time.stages.items()},
            "shared": time.shared,
            "share_done": {name: done.get(name, 0.0) for name in time.stages},
            "total": held * time.total,
            "done": held * time.done,
            "at_most": held * time.at_most,
            "wall": time.wall,
            "wall_left": time.wall_left,
            "slots": slots,
            "comparison": held * time.comparison,
        },
        "num_compared": num_compared(config),
    }


def works(config: RunConfig) -> dict[str, Callable[[RunConfig, Inspection], Memory]]:
    """The kinds of work whose memory is counted, and by what."""
    found: dict[str, Callable[[RunConfig, Inspection], Memory]] = {
        "trial, training": training_memory,
        "trial, scoring": scoring_memory,
        "prune": prune_memory,
    }
    if config.measured_methods:
        found["sensitivity"] = sensitivity_memory
    if config.finetune.compare:
        found["comparison"] = comparison_memory
    return found


def memory_text(found: Mapping[str, Any]) -> list[str]:
    """The memory as lines: of each kind of work its total and what it is of, then its parts, the largest first."""
    works, free, trials = found["memory"], found["memory_free"], found["trials_sharing_memory"]
    beside = f" with {trials} trials or fine-tunes at once" if trials > 1 else ""
    here = "" if free is None else f"; {_amount(free)} free here"
    lines = [f"memory:      {_amount(found['memory_at_once'])} at most{beside}{here}"]
    for name, each in works.items():
        parts = sorted(each["parts"].items(), key=lambda part: -part[1])
        lines.append(f"    {name:<15} {_amount(each['total']):>8}: {each['at']}")
        lines.append(f"      {', '.join(f'{part} {_amount(size)}' for part, size in parts)}")
    return lines


def time_text(found: Mapping[str, Any], has_gpu: bool) -> list[str]:
    """The hours as lines: all of it, by stage, and by what they were estimated."""
    time = found["hours"]
    taken = {name: _taken(hours) for name, hours in time.items() if isinstance(hours, float)}
    done = f", {taken['done']} of it done" if time["done"] else ""
    left = f", {taken['wall_left']} of it left" if time["done"] else ""
    slots, kind = counted(time["slots"], "slot"), "GPU" if has_gpu else "slot"
    return [
        f"time:        about {taken['wall']} of work on {slots}{left}; {taken['total']} of {kind} time{done} (at most "
        f"{taken['at_most']}, with no trial stopped)",
        *_stage_lines(time),
        f"    {time['rates']}",
        *([f"    {time['busy']}"] if time["busy"] else []),
        f"    rows of {CHARACTERS_A_TOKEN} characters a token, {CHOICES} answers a question; starts of processes, "
        "loading and saving come on top, with a model as small as the demo's up to as much again",
        f"comparison:  {_comparison(found, kind)}",
    ]


def _comparison(found: Mapping[str, Any], kind: str) -> str:
    """What `finetune.compare` takes of the hours, or would add to them."""
    time, fine_tunes = found["hours"], counted(found["num_compared"], "fine-tune")
    taken, total = _taken(time["comparison"]), _taken(time["total"])
    if "comparison" in time["stages"]:
        share = time["comparison"] / time["total"]
        return f"{share:.0%} of the {kind} time, {taken} of {total}: {fine_tunes}, after the winner's report"
    return f"off; `finetune.compare=true` would add {fine_tunes}, {taken} of {kind} time to {total}"


def _stage_lines(time: Mapping[str, Any]) -> list[str]:
    """The stages by how many slots share each."""
    lines = []
    for slots in sorted(set(time["shared"].values())):
        stages = [_stage(time, stage) for stage in time["stages"] if time["shared"][stage] == slots]
        lines.append(f"    {'on 1 slot' if slots == 1 else f'shared by {slots} slots'}: {', '.join(stages)}")
    return lines


def _stage(time: Mapping[str, Any], stage: str) -> str:
    share = time["share_done"][stage]
    return f"{stage} {_taken(time['stages'][stage])}{f' ({share:.0%} done)' if share else ''}"


def _taken(hours: float) -> str:
    """A time in the unit that fits; what rounds to nothing is still something."""
    seconds = 3600 * hours
    return "< 1 s" if seconds > 0 and round(seconds) == 0 else duration(seconds)


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
