"""How long a trial takes to start: from scratch and from the bank.

    .venv/bin/python benchmarks/trial_start.py RUN --config CONFIG      # after qpruner bank CONFIG

From scratch means to load, quantize, start by LoftQ and attach adapters, as every trial of a search
without a bank would. Each repeat is two processes, one from scratch and one from the bank. Their
libraries are imported before the clock starts, as in a worker, and the files are in the page cache.
Prints wall-clock and processor seconds, and a JSON line.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
from harness import command_line, median_and_range, run_for_record

from qpruner.config.load import load_config
from qpruner.config.schema import RunConfig
from qpruner.models.layout import group_linears, table_paths
from qpruner.models.loading import checkpoint_config, load_dense
from qpruner.models.memory import freeze_libraries
from qpruner.plans.plan import UNPRUNED
from qpruner.quantization.assembly import attach_adapters, plan_model
from qpruner.quantization.bank import BankSource, build_entries, read_plan
from qpruner.quantization.formats import DENSE, format_of
from qpruner.quantization.mixed import packed_layer

SCRATCH = "scratch"
BANK = "bank"


def from_scratch(config: RunConfig, checkpoint: Path, plan: dict[str, str]) -> torch.nn.Module:
    """Build the model of a plan without a bank; embeddings stay unpacked."""
    dtype = getattr(torch, config.model.dtype)
    model = load_dense(str(checkpoint), config.model.dtype)
    starts: dict[str, torch.Tensor] = {}
    for name, paths in group_linears(model.config, config.quantize.group).items():
        weights = {path: model.get_submodule(path).weight for path in paths}
        packing = format_of(plan[name])
        [entry] = build_entries(weights, [packing], lambda packing: config.lora, config.seed)
        for path in paths:
            own = {
                key.removeprefix(f"{path}."): value
                for key, value in entry.tensors.items()
                if key.startswith(path)
            }
            for key in ("lora_A", "lora_B"):
                starts[f"{path}.{key}"] = own.pop(key)
            linear: Any = model.get_submodule(path)
            model.set_submodule(path, packed_layer(linear, format_of(plan[name]), own, dtype))
    return attach_adapters(model, starts, config.lora, config.quantize.group, config.seed)


def measure(config: RunConfig, run: Path, turn: int, kind: str) -> dict[str, float]:
    """Time how a trial starts in this process, which must not have built a model before."""
    cut = next(iter(config.prune.cuts))
    checkpoint = run / ("prepare/model" if cut == UNPRUNED else f"cuts/{cut}")
    bank = BankSource(
        run / "starts",
        checkpoint,
        config.quantize.group,
        config.model.dtype,
        config.lora,
        config.seed,
    )
    offered = banked_formats(run, cut)
    for name in table_paths(checkpoint_config(checkpoint)):
        offered[name] = [DENSE]
    generator = random.Random(turn)
    plan = {name: generator.choice(levels) for name, levels in offered.items()}
    freeze_libraries()
    if kind == BANK:
        read_plan(bank, plan)  # makes its entries

    started = time.monotonic()
    processor_started = time.process_time()
    if kind == BANK:
        plan_model(bank, plan, config.seed)
    else:
        from_scratch(config, checkpoint, plan)
    return {
        "s": time.monotonic() - started,
        "s of processor time": time.process_time() - processor_started,
    }


def banked_formats(run: Path, cut: str) -> dict[str, list[str]]:
    """List the packed formats of each group in a block."""
    formats: dict[str, list[str]] = {}
    for path in sorted((run / "banks" / cut).glob("*/layers.*.safetensors")):
        formats.setdefault(path.stem, []).append(path.parent.name)
    return formats


def main() -> None:
    """Start processes in turns, and print their times."""
    parser = command_line(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", type=Path, required=True, help="the run's configuration file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--only", nargs=2, metavar=("TURN", "KIND"), help="one repeat in this process"
    )
    arguments = parser.parse_args()
    if arguments.only:
        turn, kind = arguments.only
        config = load_config(arguments.config)
        print(json.dumps(measure(config, arguments.run, int(turn), kind)))
        return

    command = [sys.executable, __file__, str(arguments.run), "--config", str(arguments.config)]
    taken: dict[str, list[dict[str, float]]] = {SCRATCH: [], BANK: []}
    for turn in range(arguments.repeats):
        for kind, repeats in taken.items():
            repeats.append(run_for_record([*command, "--only", str(turn), kind]))
    for kind, repeats in taken.items():
        for unit in repeats[0]:
            seconds = [repeat[unit] for repeat in repeats]
            from_scratch_seconds = [repeat[unit] for repeat in taken[SCRATCH]]
            times = statistics.median(from_scratch_seconds) / statistics.median(seconds)
            print(f"{kind:10} {median_and_range(seconds)} {unit}, {times:.1f}x")
    print(json.dumps({"repeats": arguments.repeats, "seconds": taken}))


if __name__ == "__main__":
    main()
