"""A part of `gpu_7b.py`: what `qpruner check` expects of memory and seconds, beside what the other parts measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from gpu_setup import Figures, Setup

from qpruner.config.schema import RunConfig
from qpruner.data.sources import Example
from qpruner.estimate import matmul_speed as products
from qpruner.estimate import memory, work
from qpruner.estimate import step_times as pace
from qpruner.pipeline import preflight
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import CHARACTERS_A_TOKEN, RowCounts
from qpruner.quantization.bank import EntrySettings


def estimates(setup: Setup) -> Figures:
    """Seconds by `check` and by `check --measure`, and bytes; `measured` is null where a part has not run."""
    config, inspection, found = setup.config, inspected(setup), measured(setup)
    by_products, by_steps = (stage_seconds(config, inspection, each) for each in rates(config, inspection))
    lasted = {
        "prune": found("prune", "cut"),
        "bank": found("bank", "pack"),
        "search": found("trial", "training_and_scoring"),
    }
    training, scoring = memory.training_memory(config, inspection), memory.scoring_memory(config, inspection)
    held = {
        "prune": (memory.prune_memory(config, inspection).total, found("prune", "peak_bytes")),
        "step": (training.total, found("memory", "qpruner_4_and_8_bits_bytes")),
        "trial": (max(training.total, scoring.total), found("trial", "peak_bytes")),
    }
    return {
        f"{name}_seconds": {"check": by_products[name], "check_measure": by_steps[name], "measured": seconds}
        for name, seconds in lasted.items()
    } | {f"{name}_memory": {"check": expected, "measured": peak} for name, (expected, peak) in held.items()}


def stage_seconds(config: RunConfig, inspection: Inspection, speed: work.Rates) -> dict[str, float]:
    """Of each stage on one slot; with one trial allowed, the search is that trial."""
    hours = work.hours(config, inspection, speed, slots=1, has_gpus=torch.cuda.is_available())
    return {name: 3600 * each for name, each in hours.stages.items()}


def inspected(setup: Setup) -> Any:
    """What the estimates read of a `preflight.Inspection`, with rows of the benchmark's lengths and no task."""
    config, base = setup.config, setup.base()
    cuts = preflight.cuts_in_effect(config.prune, base)
    pruned = preflight.layout_for(config, cuts[0].expected)
    shapes = preflight.Shapes(
        model_config=base,
        base=preflight.layout_for(config, base),
        cuts=cuts,
        pruned=pruned,
        is_estimate=cuts[0].settings.selection == "global" or cuts[0].settings.drops_blocks,
        budget_bytes=preflight.budget_bytes(config.quantize, pruned, config.search.pareto),
        plan=None,
        packs=True,
    )
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    train, validation = setup.train_rows, setup.validation_rows
    splits = {"train": train, "validation": validation, "confirmation": validation[:1], "calibration": train[:1]}
    texts = {name: [as_text(len(row["input_ids"])) for row in rows] for name, rows in splits.items()}
    samples = {"importance": config.calibration.num_samples, "sensitivity": 0}
    counts = RowCounts(samples, {}, config.calibration.max_length)
    preflight.check_device(capability, config, base, cuts, packs=True)
    return SimpleNamespace(**vars(shapes), examples=texts, questions={}, counts=counts)


def as_text(length: int) -> Example:
    """A row as `Setup` makes it, half a prompt, in characters."""
    half = length // 2 * CHARACTERS_A_TOKEN
    return Example("text", "x" * half, "", "x" * (length * CHARACTERS_A_TOKEN - half))


def rates(config: RunConfig, inspection: Inspection) -> tuple[work.Rates, work.Rates]:
    """By matrix products timed here, as `check` has them, and by steps of a few blocks, as `check --measure`."""
    linears = (linear for group in inspection.pruned.groups for linear in group.linears)
    widest = max(linears, key=lambda linear: linear.num_weights)
    tokens, dtype = config.training.micro_batch_size * config.data.max_length, config.model.dtype
    speed = products.operations_per_second(widest.rows, widest.columns, tokens, dtype, 1, 1)
    hidden = int(inspection.model_config.hidden_size)
    by_products = (
        work.gpu_rates(speed, "here") if torch.cuda.is_available() else work.cpu_rates(speed, hidden, 1, "here")
    )
    high, labelled = work.share_at_highest(config, inspection), work.share_labelled(config, inspection)
    seconds = pace.measure(config, inspection.cuts[0].expected, high, labelled, threads=1)
    by_steps = work.measured_rates(config, inspection, seconds.training, seconds.scoring, "here")
    settings = EntrySettings(config.lora, config.quantize.double_quant, config.seed)
    packing = products.packing_per_second(widest.rows, widest.columns, settings, config.quantize.bits, dtype, 1, 1)
    return replace(by_products, packing=packing), replace(by_steps, packing=packing)


def measured(setup: Setup) -> Callable[[str, str], Any]:
    """Looks up a figure of the newest line of a part that did not fail."""
    results = setup.work / "results.jsonl"
    lines = map(json.loads, results.read_text().splitlines() if results.is_file() else ())
    newest = {line["part"]: line for line in lines if "error" not in line and line["shape"] == setup.shape}
    return lambda part, figure: newest.get(part, {}).get(figure)
