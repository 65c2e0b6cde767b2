"""A part of `gpu_7b.py`: what `qpruner check` expects of memory and seconds, beside what the other
parts measured."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_setup import Figures, Setup
from harness import read_records

from qpruner.data.sources import Example
from qpruner.estimate import hours, memory
from qpruner.pipeline.preflight import Inspection, check_device
from qpruner.pipeline.preflight_rows import CHARACTERS_A_TOKEN, Rows
from qpruner.pipeline.shapes import shapes_of
from qpruner.pruning.prune import planned_cut


def estimates(setup: Setup) -> Figures:
    """Seconds and bytes as `check --measure` tells them; `measured` is null where a part has not
    run."""
    config = setup.config
    inspection = inspected(setup)
    found = measured(setup)
    rates = hours.measured_rates(config, inspection, threads=1, machine="here")
    times = hours.stage_times(config, inspection, rates, slots=1)
    expected = {name: 3600 * each.hours for name, each in times.items()}
    lasted = {
        "prune": found("prune", "cut"),
        "search": found("trial", "training_and_scoring"),
    }
    training, scoring = (
        memory.training_memory(config, inspection),
        memory.scoring_memory(config, inspection),
    )
    held = {
        "prune": (memory.prune_memory(config, inspection).total, found("prune", "peak_bytes")),
        "step": (training.total, found("memory", "qpruner_4_and_8_bits_bytes")),
        "trial": (max(training.total, scoring.total), found("trial", "peak_bytes")),
    }
    return {
        f"{name}_seconds": {"check": expected[name], "measured": seconds}
        for name, seconds in lasted.items()
    } | {f"{name}_memory": {"check": size, "measured": peak} for name, (size, peak) in held.items()}


def inspected(setup: Setup) -> Inspection:
    """The shapes of the benchmark's model, with rows of the benchmark's lengths and no task."""
    config = setup.config
    base = setup.base()
    has_gpu = torch.cuda.is_available()
    check_device(torch.cuda.get_device_capability() if has_gpu else None, config, packs=True)
    cuts = {name: planned_cut(base, each) for name, each in config.prune.cuts.items()}
    shapes = shapes_of(config, base, cuts, cuts.__getitem__, on_gpu=has_gpu, packs=True)
    train, validation = setup.train_rows, setup.validation_rows
    splits = {
        "train": train,
        "validation": validation,
        "confirmation": validation[:1],
        "calibration": train[:1],
    }
    texts = {
        name: [as_text(len(row["input_ids"])) for row in rows] for name, rows in splits.items()
    }
    rows = Rows(examples=texts, questions={}, num_questions={}, metrics={}, warnings=())
    return Inspection(shapes, rows)


def as_text(length: int) -> Example:
    """A row as `Setup` makes it, half a prompt, in characters."""
    half = length // 2 * CHARACTERS_A_TOKEN
    return Example("text", "x" * half, "", "x" * (length * CHARACTERS_A_TOKEN - half))


def measured(setup: Setup) -> Callable[[str, str], Any]:
    """Looks up a figure of the newest line of a part that did not fail."""
    lines = read_records(setup.work / "results.jsonl")
    newest = {
        line["part"]: line for line in lines if "error" not in line and line["shape"] == setup.shape
    }
    return lambda part, figure: newest.get(part, {}).get(figure)
