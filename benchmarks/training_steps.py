"""Time a training step of each method, and how much memory it takes.

    .venv/bin/python benchmarks/training_steps.py runs/moved [--formats q4_0 w3] [--turns 15]

The model of each method has the same packed weights. Steps are taken in turns in one process: a
step of 4 rows of 128 tokens through forward pass, backward pass and optimizer, with labels for all
tokens. Peak memory is measured in a process of its own for each method, less what the process held
before the model was built. Prints seconds a step and their ratio; the ratio is the median over
turns, as other work slows both methods of a turn.
"""

import json
import os
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import (
    command_line,
    in_turns,
    median_and_range,
    print_heading,
    print_row,
    run_for_record,
)

from qpruner.config.schema import LoraConfig
from qpruner.models.layout import group_linears
from qpruner.models.loading import checkpoint_config
from qpruner.models.memory import PeakMemory, begin_job
from qpruner.plans.plan import EMBEDDINGS
from qpruner.quantization.assembly import plan_model
from qpruner.quantization.bank import BankSource

METHODS = ("adapter", "scales")
ROWS = 4
TOKENS = 128


class Step:
    """A model that is trained by one method on one batch."""

    def __init__(self, checkpoint: Path, folder: Path, method: Any, format_: str) -> None:
        bank = BankSource(
            folder / method,
            checkpoint,
            "block",
            "bfloat16",
            LoraConfig(rank=8, alpha=16, init="plain"),
            seed=0,
            method=method,
        )
        config = checkpoint_config(checkpoint)
        plan = {EMBEDDINGS: "q8_0"} | dict.fromkeys(group_linears(config, "block"), format_)
        self._model: Any = plan_model(bank, plan, seed=0).train()
        trained = [value for value in self._model.parameters() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-6)
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randint(config.vocab_size, (ROWS, TOKENS), generator=generator)

    def __call__(self) -> None:
        loss = self._model(input_ids=self._rows, labels=self._rows, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def peak_bytes(checkpoint: Path, folder: Path, method: str, format_: str) -> int:
    """Take two steps in this process; return the memory that they and the model took at most."""
    Step(checkpoint, folder, method, format_)  # makes the bank's entries
    memory = PeakMemory()
    step = Step(checkpoint, folder, method, format_)
    for _ in range(2):
        step()
    return memory.bytes()


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--formats", nargs="+", default=["q4_0", "w3"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", nargs=3, metavar=("METHOD", "FORMAT", "FOLDER"))
    arguments = parser.parse_args()
    begin_job(len(os.sched_getaffinity(0)))
    checkpoint = arguments.checkpoint.absolute()
    if arguments.only:
        method, format_, folder = arguments.only
        print(json.dumps({"bytes": peak_bytes(checkpoint, Path(folder), method, format_)}))
        return

    print_heading(["format", "method", "s a step", "of an adapter's", "peak MB"])
    for format_ in arguments.formats:
        with TemporaryDirectory() as name:
            folder = Path(name)
            steps = {method: Step(checkpoint, folder, method, format_) for method in METHODS}
            seconds = in_turns(steps, arguments.turns)
            del steps
            for method, taken in seconds.items():
                pairs = zip(taken, seconds["adapter"], strict=True)
                ratio = median(own / adapter for own, adapter in pairs)
                command = [sys.executable, __file__, str(checkpoint)]
                peak = run_for_record([*command, "--only", method, format_, str(folder)])["bytes"]
                cells = [format_, method, median_and_range(taken), f"{ratio:.2f}"]
                print_row([*cells, f"{peak / 1e6:.0f}"])


if __name__ == "__main__":
    main()
