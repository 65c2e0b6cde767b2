"""A part of `gpu_7b.py`: what `qpruner check` expects of memory and seconds, beside what the other
parts measured."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from gpu_setup import Figures, Setup

from qpruner.data.sources import Example
from qpruner.estimate import hours, memory
from qpruner.pipeline import preflight
from qpruner.pipeline.preflight_rows import CHARACTERS_A_TOKEN
from qpruner.plans.plan import UNPRUNED
from qpruner.pruning.prune import planned_cut


def estimates(setup: Setup) -> Figures:
    """Seconds and bytes as `check --measure` tells them; `measured` is null where a part has not
    run."""
    config, inspection, found = setup.config, inspected(setup), measured(setup)
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


def inspected(setup: Setup) -> Any:
    """Stands for a `preflight.Inspection` in the estimates, with rows of the benchmark's lengths
    and no task."""
    config, base = setup.config, setup.base()
    cuts = {name: planned_cut(base, each) for name, each in config.prune.cuts.items()}
    [(name, cut)], on_gpu = cuts.items(), torch.cuda.is_available()
    pruned = preflight.layout_for(config, cut.expected, on_gpu, name)
    shapes = preflight.Shapes(
        model_config=base,
        base=preflight.layout_for(config, base, on_gpu, UNPRUNED),
        cuts=cuts,
        layouts={name: pruned},
        left_out={},
        is_estimate=cut.settings.selection == "global" or cut.settings.drops_blocks,
        budget_bytes=preflight.budget_bytes(config, {name: pruned}),
        plan=None,
        packs=True,
    )
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
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
    preflight.check_device(capability, config, packs=True)
    preflight.check_cut(on_gpu, config, cut)
    derived = {"reference": shapes.reference, "expected": shapes.expected}
    return SimpleNamespace(**vars(shapes), **derived, examples=texts, questions={})


def as_text(length: int) -> Example:
    """A row as `Setup` makes it, half a prompt, in characters."""
    half = length // 2 * CHARACTERS_A_TOKEN
    return Example("text", "x" * half, "", "x" * (length * CHARACTERS_A_TOKEN - half))


def measured(setup: Setup) -> Callable[[str, str], Any]:
    """Looks up a figure of the newest line of a part that did not fail."""
    results = setup.work / "results.jsonl"
    lines = map(json.loads, results.read_text().splitlines() if results.is_file() else ())
    newest = {
        line["part"]: line for line in lines if "error" not in line and line["shape"] == setup.shape
    }
    return lambda part, figure: newest.get(part, {}).get(figure)
