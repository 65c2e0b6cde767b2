"""Fine-tune every plan of a small space of cuts and formats as a trial of a run would, for replays
of a search.

    # makes cuts, bank and sensitivities
    .venv/bin/qpruner sensitivity CONFIG
    .venv/bin/python benchmarks/joint_table.py CONFIG --groups 3 --out T.json [--again 0.1]

A plan of the table is a cut, a format for each of `--groups` runs of consecutive blocks, and one
for the embeddings: with the demo's configuration 3 cuts x 3 formats in 3 runs and in the embeddings
are 243 fine-tunes. Every plan is run by `run_trial`, with its validation loss at every rung; a
share `--again` of them a second time, under the next seed (of data order and dropout), for the
noise of a score. What is measured goes to `OUT.lines` as it comes: a build that was interrupted
goes on there.
"""

import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import append_record, command_line, fresh_processes, read_records

from qpruner.config.load import load_config
from qpruner.config.schema import RunConfig
from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import shared
from qpruner.pipeline.flow import recorded
from qpruner.pipeline.preflight import inspect
from qpruner.plans.plan import EMBEDDINGS, HEAD
from qpruner.runs.records import PruneRecord, RungResult, SensitivityRecord
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob

Plan = tuple[str, ...]  # a cut, and a format for each of the table's groups


def opened(config: RunConfig) -> Context:
    """Open a run that has its sensitivities."""
    context = Context(
        config, RunDir(config.output, create=False), lambda event: None, None, inspect(config)
    )
    recorded(context)
    context.record(SensitivityRecord)
    return context


def members(context: Context, groups: int) -> dict[str, tuple[str, ...]]:
    """Map each group of the table to the run's groups in it: consecutive blocks, and embeddings
    with the head."""
    names = [group.name for group in context.shapes.reference.groups]
    blocks = [name for name in names if name not in (EMBEDDINGS, HEAD)]
    parts = [part.tolist() for part in np.array_split(np.array(blocks), groups)]
    found = {f"{part[0]}-{part[-1].rpartition('.')[2]}": tuple(part) for part in parts}
    return found | {EMBEDDINGS: tuple(name for name in names if name in (EMBEDDINGS, HEAD))}


def every_plan(context: Context, of: dict[str, tuple[str, ...]]) -> Iterator[Plan]:
    """List the plans of the table: all cuts with all formats."""
    quantize = context.config.quantize
    levels = [quantize.embedding_levels if name == EMBEDDINGS else quantize.levels for name in of]
    yield from itertools.product(context.shapes.cuts, *levels)


def measure(config: RunConfig, groups: int, todo: list[tuple[Plan, int]], lines: Path) -> None:
    """Run each (plan, seed) as a trial on one thread, and append its losses to `lines`."""
    import torch

    torch.set_num_threads(1)
    context = opened(config)
    of = members(context, groups)
    materials = Materials(
        {cut: context.places.bank_of(cut) for cut in context.shapes.cuts}, context.places.data
    )
    for plan, seed in todo:
        cut, *levels = plan
        formats = {
            name: level for each, level in zip(of.values(), levels, strict=True) for name in each
        }
        ordered = {
            name: formats[name]
            for name in (group.name for group in context.shapes.layout_of(cut).groups)
        }
        losses = dict[int, float]()
        started = time.monotonic()

        def report(
            result: RungResult | None, checkpoint: Path, losses: dict[int, float] = losses
        ) -> None:
            if result:
                losses[result.step] = result.loss

        own = context.worker_config.model_copy(update={"seed": config.seed + seed})
        run_trial(TrialJob(own, materials, ordered, cut), None, report)
        found = {
            "plan": plan,
            "seed": seed,
            "losses": losses,
            "seconds": time.monotonic() - started,
        }
        append_record(lines, found)


def read_lines(path: Path) -> dict[tuple[Plan, int], dict[str, Any]]:
    """Read what was measured so far."""
    return {(tuple(record["plan"]), record["seed"]): record for record in read_records(path)}


def table(
    context: Context, of: dict[str, tuple[str, ...]], found: dict[tuple[Plan, int], dict[str, Any]]
) -> dict[str, Any]:
    """Put the measured losses and the bytes of all plans into one record."""
    first = {plan: each["losses"] for (plan, seed), each in found.items() if seed == 0}
    names = list(of)
    levels = sorted({level for plan in first for level in plan[1:]})
    sizes = dict[str, Any]()
    for cut in context.shapes.cuts:
        layout = context.shapes.layout_of(cut)
        sizes[cut] = {
            "fixed_bytes": layout.ungrouped_bytes + layout.adapter_bytes,
            "group_bytes": {},
        }
        for level in levels:
            packed = {
                group.name: group.packed_bytes(level, layout.element_bytes)
                for group in layout.groups
            }
            sizes[cut]["group_bytes"][level] = [
                sum(packed[name] for name in each) for each in of.values()
            ]
    made = context.record(PruneRecord).cuts
    methods = context.record(SensitivityRecord).methods
    error = of_groups(context, of, None, levels)
    return {
        "groups": names,
        "cuts": sizes,
        "multiply_adds": {cut: made[cut].multiply_adds for cut in context.shapes.cuts},
        "after_cut": {cut: round(made[cut].loss, 6) for cut in context.shapes.cuts},
        "plans": list(first),
        "rungs": {
            step: [round(losses[step], 6) for losses in first.values()]
            for step in next(iter(first.values()))
        },
        "loss_noise": float(f"{noise_of(found, str(context.config.search.steps)):.4g}"),
        "sensitivities": {method: of_groups(context, of, method, levels) for method in methods},
        "damage": {
            level: [each / len(of[name]) for name, each in zip(of, error[level], strict=True)]
            for level in levels
        },
        "seconds": round(statistics.fmean(each["seconds"] for each in found.values()), 1),
    }


def noise_of(found: dict[tuple[Plan, int], dict[str, Any]], step: str) -> float:
    """Estimate how far training seeds move a loss, without what they do to all plans of a cut: a
    standard deviation."""
    apart = dict[str, list[float]]()
    for plan, seed in found:
        if seed:
            change = found[plan, seed]["losses"][step] - found[plan, 0]["losses"][step]
            apart.setdefault(plan[0], []).append(change)
    squares = sum(sum((each - statistics.fmean(of)) ** 2 for each in of) for of in apart.values())
    return float((squares / max(1, sum(map(len, apart.values())) - len(apart)) / 2) ** 0.5)


def of_groups(
    context: Context, of: dict[str, tuple[str, ...]], method: str | None, levels: list[str]
) -> dict[str, list[float]]:
    """Sum a sensitivity, or without a `method` the error of weights, over each group: level ->
    values by group."""
    values = shared(context, method, [name for each in of.values() for name in each], levels)
    counts = np.cumsum([len(each) for each in of.values()])[:-1]
    return {
        level: [float(f"{part.sum():.6g}") for part in np.split(values[level], counts)]
        for level in levels
    }


def main() -> None:
    """Measure what is missing and write the table."""
    parser = command_line(__doc__, overrides=True)
    parser.add_argument("config", type=Path)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", type=float, default=0.1)
    asked = parser.parse_args()
    config = load_config(asked.config, asked.overrides)
    context = opened(config)
    lines = asked.out.with_suffix(".lines")
    of = members(context, asked.groups)
    plans = list(every_plan(context, of))
    again = np.random.default_rng(0).permutation(len(plans))[: round(asked.again * len(plans))]
    wanted = [*((plan, 0) for plan in plans), *((plans[at], 1) for at in again)]
    # At random, so that a table that was interrupted covers all cuts and formats alike.
    order = np.random.default_rng(1).permutation(len(wanted))
    known = read_lines(lines)
    todo = [wanted[at] for at in order if wanted[at] not in known]
    print(f"{len(wanted)} fine-tunes, {len(todo)} to measure", flush=True)
    with fresh_processes(asked.processes) as pool:
        parts = [todo[start :: asked.processes] for start in range(asked.processes)]
        running = [pool.submit(measure, config, asked.groups, part, lines) for part in parts]
        for future in running:
            future.result()
    asked.out.write_text(
        json.dumps(table(context, of, read_lines(lines)), separators=(",", ":")) + "\n"
    )


if __name__ == "__main__":
    main()
