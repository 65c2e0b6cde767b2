"""Estimate the memory and the hours of a run without loading its model.

Memory is given by part for each kind of work, hours by stage if steps were timed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.estimate import memory as memory_of
from qpruner.estimate.hours import CHOICES, Rates, stage_times
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import CHARACTERS_A_TOKEN
from qpruner.wording import counted, duration


def facts(
    config: RunConfig, inspection: Inspection, rates: Rates | None, slots: int, gpus: float | None
) -> dict[str, Any]:
    """Estimate the memory of every kind of work, and the hours of every long stage.

    Args:
        config: The validated configuration.
        inspection: The shapes, rows and questions of the run.
        rates: Seconds per token of timed steps; None leaves the hours out.
        slots: Number of trials that run at once.
        gpus: GPUs that each of them holds; None without GPUs.

    Returns:
        Memory in bytes and hours, as `memory_text` and `time_text` read them.
    """
    memory = {name: work(config, inspection) for name, work in works(config).items()}
    sharing = slots if gpus is None else max(1, int(1 / gpus))
    in_slots = ("trial", "comparison")
    at_once = {
        name: each.total * (sharing if name.startswith(in_slots) else 1)
        for name, each in memory.items()
    }
    return {
        "memory": {
            name: {"at": each.about, "parts": each.parts, "total": each.total}
            for name, each in memory.items()
        },
        "memory_at_once": max(at_once.values()),
        "trials_sharing_memory": sharing,
        "hours": None if rates is None else _hours(config, inspection, rates, slots, gpus),
    }


def _hours(
    config: RunConfig, inspection: Inspection, rates: Rates, slots: int, gpus: float | None
) -> dict[str, Any]:
    """Return the hours elapsed (`wall`), and the hours of use by stage and in total.

    The use is that of GPUs or, without GPUs, of slots. A slot is the room for one trial.
    """
    held = 1.0 if gpus is None else gpus
    times = stage_times(config, inspection, rates, slots)
    # Half a GPU is half as fast; several GPUs make a trial no faster than one.
    hours = {name: each.hours / min(1.0, held) for name, each in times.items()}
    return {
        "rates": rates.origin,
        "stages": {name: held * each for name, each in hours.items()},
        "total": held * sum(hours.values()),
        "wall": sum(hours[name] / each.slots for name, each in times.items()),
        "slots": slots,
    }


def works(config: RunConfig) -> Mapping[str, Callable[[RunConfig, Inspection], memory_of.Memory]]:
    """Return, for each kind of work by name, the function that estimates its memory."""
    counters = {
        "trial, training": memory_of.training_memory,
        "trial, scoring": memory_of.scoring_memory,
    }
    counters["prune"] = memory_of.prune_memory
    if config.quantize.rounding == "gptq":
        counters["bank"] = memory_of.rounding_memory
    if config.measured_methods:
        counters["sensitivity"] = memory_of.sensitivity_memory
    if config.finetune.compare:
        counters["comparison"] = memory_of.comparison_memory
    return counters


def memory_text(found: Mapping[str, Any]) -> list[str]:
    """Format the memory as lines: the total of each kind of work, then its parts by size."""
    free, trials = found["memory_free"], found["trials_sharing_memory"]
    beside = f" with {trials} trials or fine-tunes at once" if trials > 1 else ""
    here = "" if free is None else f"; {_amount(free)} free here"
    lines = [f"memory:      {_amount(found['memory_at_once'])} at most{beside}{here}"]
    for name, each in found["memory"].items():
        parts = sorted(each["parts"].items(), key=lambda part: -part[1])
        lines.append(f"    {name:<15} {_amount(each['total']):>8}: {each['at']}")
        lines.append(f"      {', '.join(f'{part} {_amount(size)}' for part, size in parts)}")
    return lines


def time_text(found: Mapping[str, Any], has_gpu: bool) -> list[str]:
    """Format the hours as lines: the totals with each stage, and the timed steps."""
    if (time := found["hours"]) is None:
        return [
            "time:        not estimated; `--measure` times a few steps of these shapes on this "
            "machine"
        ]
    wall, total, kind = _taken(time["wall"]), _taken(time["total"]), "GPU" if has_gpu else "slot"
    return [
        f"time:        about {wall} on {counted(time['slots'], 'slot')}, {total} of {kind} time: "
        + ", ".join(f"{name} {_taken(each)}" for name, each in time["stages"].items()),
        f"    {time['rates']}",
        f"    assumed: {CHARACTERS_A_TOKEN} characters per token, {CHOICES} answers per question; "
        "not included are "
        "sensitivities, files for servers, starts of processes, loading, packing and saving, which "
        "may double the time "
        "of a model as small as the demo's",
    ]


def _taken(hours: float) -> str:
    seconds = 3600 * hours
    return "< 1 s" if seconds > 0 and round(seconds) == 0 else duration(seconds)


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
