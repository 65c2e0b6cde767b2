"""How long a trial takes to start: from scratch and from the bank.

    .venv/bin/python benchmarks/trial_start.py RUN --config CONFIG      # after qpruner bank CONFIG
    .venv/bin/python benchmarks/trial_start.py --rows 48760             # only the training rows, as
    many as Alpaca's

From scratch is load, quantize, LoftQ and adapters, as every trial of a search without a bank does
it. Every repeat is two processes of its own, one from scratch and one from the bank, in turns, the
libraries imported and settled before as in a worker, the files in the page cache. Wall-clock and
processor seconds. Prints a table and a JSON line.

With `--rows` it makes a training set with lengths like Alpaca's (110 tokens in the mean), and a
process of its own for every repeat loads it and pads the first batch of 64 rows. Memory is what the
process has more of after that.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets  # noqa: F401
import numpy as np
import peft  # noqa: F401
import psutil
import torch
import yaml

from qpruner.config.schema import RunConfig
from qpruner.data.encoding import collate, load_encoded, save_encoded
from qpruner.models.layout import group_linears, table_paths
from qpruner.models.loading import checkpoint_config, load_dense
from qpruner.models.memory import freeze_libraries
from qpruner.plans.plan import UNPRUNED
from qpruner.quantization.assembly import attach_adapters, plan_model
from qpruner.quantization.bank import BankSource, build_entries, read_plan
from qpruner.quantization.formats import DENSE, format_of
from qpruner.quantization.mixed import packed_layer


def from_scratch(config: RunConfig, checkpoint: Path, plan: dict[str, str]) -> torch.nn.Module:
    """The model of a plan without a bank; embeddings stay unpacked."""
    dtype = getattr(torch, config.model.dtype)
    model = load_dense(str(checkpoint), config.model.dtype)
    starts: dict[str, torch.Tensor] = {}
    for name, paths in group_linears(model.config, config.quantize.group).items():
        weights = {path: model.get_submodule(path).weight for path in paths}
        [entry] = build_entries(weights, [format_of(plan[name])], config.lora, config.seed)
        for path in paths:
            own = {
                key.removeprefix(f"{path}."): value
                for key, value in entry.tensors.items()
                if key.startswith(path)
            }
            starts |= {f"{path}.{key}": own.pop(key) for key in ("lora_A", "lora_B")}
            linear: Any = model.get_submodule(path)
            model.set_submodule(path, packed_layer(linear, plan[name], own, dtype))
    return attach_adapters(model, starts, config.lora, config.quantize.group, config.seed)


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    started, busy = time.monotonic(), time.process_time()
    work()
    return time.monotonic() - started, time.process_time() - busy


def measure(
    config: RunConfig, run: Path, turn: int, banked: bool
) -> dict[str, tuple[float, float]]:
    """Time how a trial starts in this process, which must not have built a model before."""
    cut, offered = next(iter(config.prune.cuts)), banked_formats(config, run)
    checkpoint = run / ("prepare/model" if cut == UNPRUNED else f"cuts/{cut}")
    bank = BankSource(
        run / "starts",
        checkpoint,
        config.quantize.group,
        config.model.dtype,
        config.lora,
        config.seed,
    )
    freeze_libraries()
    generator = random.Random(turn)
    offered |= {name: [DENSE] for name in table_paths(checkpoint_config(checkpoint))}
    plan = {name: generator.choice(levels) for name, levels in offered.items()}
    if not banked:
        return {"from scratch": seconds(lambda: from_scratch(config, checkpoint, plan))}
    read_plan(bank, plan)  # makes its entries
    return {"bank": seconds(lambda: plan_model(bank, plan, config.seed))}


def make_rows(count: int, folder: Path) -> None:
    """Save rows whose prompts are about as long as Alpaca's, template included, and their
    responses, too."""
    generator = np.random.default_rng(0)
    prompts = generator.lognormal(np.log(45), 0.25, count).astype(int).clip(38, 200)
    responses = generator.lognormal(np.log(42), 0.95, count).astype(int).clip(2, 400)
    ids = [
        generator.integers(0, 32000, prompt + rest).tolist()
        for prompt, rest in zip(prompts, responses, strict=True)
    ]
    masks = [[-100] * prompt for prompt in prompts]
    save_encoded(
        [
            {"input_ids": row, "labels": mask + row[len(mask) :]}
            for row, mask in zip(ids, masks, strict=True)
        ],
        folder,
    )


def read_rows(folder: Path) -> tuple[float, float, float]:
    """Return what it costs to read rows until the first batch is there.

    It is wall-clock seconds, processor seconds, and the megabytes that stay.
    """
    freeze_libraries()
    kept: list[Any] = []

    def start() -> None:
        rows = load_encoded(folder)
        kept.extend(
            (rows, collate([rows[index] for index in range(0, len(rows), len(rows) // 64)], 0))
        )

    before = psutil.Process().memory_info().rss
    return *seconds(start), (psutil.Process().memory_info().rss - before) / 1e6


def measure_rows(count: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "train"
        make_rows(count, folder)
        found = []
        for _ in range(repeats):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found.append(pool.submit(read_rows, folder).result())
    columns = dict(zip(("s", "s of processor time", "MB"), zip(*found, strict=True), strict=True))
    for name, values in columns.items():
        print(
            f"{count} rows {statistics.median(values):8.3f} {name} "
            f"({min(values):.3f} to {max(values):.3f})"
        )
    print(json.dumps({"rows": count, "repeats": repeats, **columns}))


def banked_formats(config: RunConfig, run: Path) -> dict[str, list[str]]:
    """The packed formats of each group in a block."""
    found: dict[str, list[str]] = {}
    for path in sorted(
        (run / "banks" / next(iter(config.prune.cuts))).glob("*/layers.*.safetensors")
    ):
        found.setdefault(path.stem, []).append(path.parent.name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--config", type=Path, help="the run's configuration file")
    parser.add_argument("--rows", type=int, help="measure reading so many training rows instead")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--only",
        nargs=2,
        metavar=("TURN", "KIND"),
        help="one repeat in this process: bank or scratch",
    )
    arguments = parser.parse_args()
    if arguments.rows:
        measure_rows(arguments.rows, arguments.repeats)
        return
    if not (arguments.run and arguments.config):
        parser.error("name RUN and --config CONFIG, or --rows NUMBER")
    config = RunConfig.model_validate(yaml.safe_load(arguments.config.read_text()))
    if arguments.only:
        turn, kind = arguments.only
        print(json.dumps(measure(config, arguments.run, int(turn), kind == "bank")))
        return
    found: dict[str, list[tuple[float, float]]] = {}
    for turn in range(arguments.repeats):
        for part in ("scratch", "bank"):
            command = [
                sys.executable,
                __file__,
                str(arguments.run),
                "--config",
                str(arguments.config),
            ]
            done = subprocess.run(
                [*command, "--only", str(turn), part], check=True, stdout=subprocess.PIPE
            )
            for kind, taken in json.loads(done.stdout.splitlines()[-1]).items():
                found.setdefault(kind, []).append(taken)
    slowest = [statistics.median(each) for each in zip(*found["from scratch"], strict=True)]
    for kind, values in found.items():
        for name, column, scratch in zip(
            ("s", "s of processor time"), zip(*values, strict=True), slowest, strict=True
        ):
            middle = statistics.median(column)
            told = f"{middle:7.2f} {name} ({min(column):.2f} to {max(column):.2f})"
            print(f"{kind:22} {told:44} {scratch / middle:6.1f}x")
    groups = len(banked_formats(config, arguments.run))
    print(json.dumps({"groups": groups, "repeats": arguments.repeats, "seconds": found}))


if __name__ == "__main__":
    main()
