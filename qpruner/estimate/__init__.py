"""Estimate the memory and the hours of a run without loading its model.

Memory is given by part for each kind of work, hours by stage if steps were timed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.estimate import memory as memory_of
from qpruner.estimate.hours import CHOICES, Rates, StageTime, stage_times
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
    sharing = slots if gpus is None else max(1, int(1 / gpus))
    memory = {}
    at_once = []
    for name, work in works(config).items():
        estimate = work(config, inspection)
        memory[name] = {"at": estimate.about, "parts": estimate.parts, "total": estimate.total}
        is_in_slots = name.startswith(("trial", "comparison", "tuned"))
        at_once.append(estimate.total * sharing if is_in_slots else estimate.total)
    hours = None
    if rates is not None:
        hours = _hours(stage_times(config, inspection, rates, slots), rates, slots, gpus)
    return {
        "memory": memory,
        "memory_at_once": max(at_once),
        "trials_sharing_memory": sharing,
        "hours": hours,
    }


def _hours(
    times: Mapping[str, StageTime], rates: Rates, slots: int, gpus: float | None
) -> dict[str, Any]:
    """Return the hours elapsed (`wall`), and the hours of use by stage and in total.

    The use is that of GPUs or, without GPUs, of slots. A slot is the room for one trial.
    """
    held = 1.0 if gpus is None else gpus
    # Half a GPU is half as fast; several GPUs make a trial no faster than one.
    hours = {name: time.hours / min(1.0, held) for name, time in times.items()}
    return {
        "rates": rates.origin,
        "stages": {name: held * taken for name, taken in hours.items()},
        "total": held * sum(hours.values()),
        "wall": sum(hours[name] / time.slots for name, time in times.items()),
        "slots": slots,
    }


def works(config: RunConfig) -> Mapping[str, Callable[[RunConfig, Inspection], memory_of.Memory]]:
    """Return, for each kind of work by name, the function that estimates its memory."""
    counters = {
        "trial, training": memory_of.training_memory,
        "trial, scoring": memory_of.scoring_memory,
        "prune": memory_of.prune_memory,
    }
    if config.quantize.uses_grams:
        counters["bank"] = memory_of.rounding_memory
    if config.quantize.rounding == "tuned":
        counters["tuned rounding"] = memory_of.tuned_rounding_memory
    if config.measured_methods:
        counters["sensitivity"] = memory_of.sensitivity_memory
    if config.finetune.compare:
        counters["comparison"] = memory_of.comparison_memory
    return counters


def memory_text(estimates: Mapping[str, Any]) -> list[str]:
    """Format the memory as lines: the total of each kind of work, then its parts by size."""
    trials = estimates["trials_sharing_memory"]
    beside = f" with {trials} trials or fine-tunes at once" if trials > 1 else ""
    free = estimates["memory_free"]
    here = "" if free is None else f"; {_amount(free)} free here"
    lines = [f"memory:      {_amount(estimates['memory_at_once'])} at most{beside}{here}"]
    for name, work in estimates["memory"].items():
        lines.append(f"    {name:<15} {_amount(work['total']):>8}: {work['at']}")
        parts = sorted(work["parts"].items(), key=lambda part: -part[1])
        sizes = [f"{part} {_amount(size)}" for part, size in parts]
        lines.append(f"      {', '.join(sizes)}")
    return lines


def time_text(estimates: Mapping[str, Any], has_gpu: bool) -> list[str]:
    """Format the hours as lines: the totals with each stage, and the timed steps."""
    time = estimates["hours"]
    if time is None:
        return [
            "time:        not estimated; "
            "`--measure` times a few steps of these shapes on this machine"
        ]
    wall = _taken(time["wall"])
    total = _taken(time["total"])
    kind = "GPU" if has_gpu else "slot"
    stages = [f"{name} {_taken(hours)}" for name, hours in time["stages"].items()]
    return [
        f"time:        about {wall} on {counted(time['slots'], 'slot')}, {total} of {kind} time: "
        f"{', '.join(stages)}",
        f"    {time['rates']}",
        f"    assumed: {CHARACTERS_A_TOKEN} characters per token, {CHOICES} answers per question; "
        "not included are sensitivities, files for servers, starts of processes, loading, packing "
        "and saving, which may double the time of a model as small as the demo's",
    ]


def _taken(hours: float) -> str:
    seconds = 3600 * hours
    return "< 1 s" if seconds > 0 and round(seconds) == 0 else duration(seconds)


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
