"""How long a trial takes to start: from scratch, from the bank, and from the bank in a worker that has run a trial.

    .venv/bin/python benchmarks/trial_start.py RUN --config CONFIG      # after qpruner run CONFIG --until bank

From scratch is load, quantize, LoftQ and adapters, as every trial of a search without a bank does it. All are measured
in one process with the libraries imported, the files in the page cache, in turns. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch
import yaml

from qpruner.config import RunConfig
from qpruner.memory import release
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense
from qpruner.quantization.assembly import Workbench, attach_adapters
from qpruner.quantization.bank import EntrySettings, build_entry
from qpruner.quantization.mixed import packed_layer


def from_scratch(config: RunConfig, checkpoint: Path, plan: dict[str, int]) -> torch.nn.Module:
    """The model of a plan without a bank."""
    dtype = getattr(torch, config.model.dtype)
    model = load_dense(str(checkpoint), config.model.dtype)
    settings = EntrySettings(config.lora, config.quantize.double_quant, config.seed)
    starts: dict[str, torch.Tensor] = {}
    for name, paths in group_linears(model.config, config.quantize.group).items():
        entry = build_entry({path: model.get_submodule(path).weight for path in paths}, plan[name], settings)
        for path in paths:
            own = {key.removeprefix(f"{path}."): value for key, value in entry.tensors.items() if key.startswith(path)}
            starts |= {f"{path}.{key}": own.pop(key) for key in ("lora_A", "lora_B")}
            linear: Any = model.get_submodule(path)
            model.set_submodule(path, packed_layer(linear, plan[name], own, dtype, config.quantize.double_quant))
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # type: ignore[assignment]
    return attach_adapters(model, starts, config.lora, config.quantize.group, config.seed)


def seconds(work: Callable[[], Any]) -> float:
    release()
    started = time.monotonic()
    work()
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", type=Path, required=True, help="the run's configuration file")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = RunConfig.model_validate(yaml.safe_load(arguments.config.read_text()))
    checkpoint, bank, quantize = arguments.run / "prune", arguments.run / "bank", config.quantize
    names = sorted({path.stem for path in bank.glob("*bit/*.safetensors")})
    found: dict[str, list[float]] = {"from scratch": [], "bank, first trial": [], "bank, worker reused": []}
    for turn in range(arguments.repeats):
        generator = random.Random(turn)
        first, second = ({name: generator.choice((4, 8)) for name in names} for _ in range(2))
        found["from scratch"].append(seconds(lambda plan=first: from_scratch(config, checkpoint, plan)))
        bench = Workbench(checkpoint, bank, quantize.group, config.model.dtype, quantize.double_quant, config.lora)
        for kind, plan in (("bank, first trial", first), ("bank, worker reused", second)):
            found[kind].append(seconds(lambda plan=plan, bench=bench: bench.model(plan, config.seed)))
        del bench
    slowest = statistics.median(found["from scratch"])
    for kind, values in found.items():
        middle = statistics.median(values)
        print(f"{kind:22} {middle:7.2f} s ({min(values):.2f} to {max(values):.2f})  {slowest / middle:6.1f}x")
    print(json.dumps({"groups": len(names), "repeats": arguments.repeats, "seconds": found}))


if __name__ == "__main__":
    main()
