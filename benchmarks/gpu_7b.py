"""Measures one GPU on a model of Llama-2-7B's shape: prune, bank, one trial, fine-tune, memory,
estimates, tests.

    # all seven parts, which take 20 minutes at most
    .venv/bin/python benchmarks/gpu_7b.py
    # two parts, on what earlier parts left in the work folder
    .venv/bin/python benchmarks/gpu_7b.py --part trial memory
    # the same on a CPU, in a minute
    .venv/bin/python benchmarks/gpu_7b.py --shape tiny

Needs torch, transformers, peft, bitsandbytes and qpruner (`gpu_kit.py` packs them for a machine
without a package index), a GPU with 24 GB and 25 GB of disk; no Ray, no datasets, no download:
weights and rows are random. Every part (gpu_parts.py) is a process of its own, of 8 minutes at
most, that prints its JSON line as it ends and appends it to `results.jsonl` in the work folder; one
that fails says why in its line, and the next begins. Ends with a table and a JSON line.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import append_record, command_line, read_records

PARTS = ("prune", "bank", "trial", "finetune", "memory", "estimates", "tests")
"""The most valuable first."""
PART_SECONDS = 480.0
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1"}
"""Defaults: one GPU, since Trainer would split its batches among several; no model hub is asked."""
Line = dict[str, Any]


def run(part: str, shape: str, folder: Path, seconds: float) -> Line:
    """Run a part in a process; returns its line, or one that says why there is none."""
    results = folder / "results.jsonl"
    before = len(read_records(results))
    why = "the time that `--minutes` leaves is over before the part begins"
    if seconds > 0:
        command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), part]
        command += ["--shape", shape, "--work", str(folder)]
        process = subprocess.Popen(command, env=ENVIRONMENT | os.environ, process_group=0)
        try:
            why = f"ended with exit code {process.wait(seconds)} and no line"
        except subprocess.TimeoutExpired:
            why = f"took longer than {seconds:.0f} s and was ended"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = read_records(results)
    if len(lines) > before:
        return lines[-1]
    line = {"part": part, "shape": shape, "error": why}
    append_record(results, line)
    print(json.dumps(line), flush=True)
    return line


def row(line: Line) -> str:
    """A part's lines of the table: its error, or its figures."""
    told = [f"error: {line['error']}"] if "error" in line else list(figures(line))
    head = f"{line['part']:10} {line.get('seconds', 0):6.1f} s  "
    return textwrap.fill(
        "; ".join(told), 120, initial_indent=head, subsequent_indent=" " * len(head)
    )


def figures(found: dict[str, Any], unit: str = "") -> Iterator[str]:
    """Numbers and texts by name, those of a nested record behind its name; lists are left to the
    JSON line."""
    for name, value in found.items():
        of = name if name.endswith(("bytes", "memory")) else unit
        if isinstance(value, dict) and name != "versions":
            yield f"{name} ({', '.join(figures(value, of))})"
        elif isinstance(value, (int, float)) and name not in ("seconds", "device_bytes"):
            yield f"{name} {value / 1e9:.2f} GB" if of else f"{name} {value:.4g}"
        elif name == "summary":
            yield str(value)


def main() -> None:
    """Run the parts while there is time."""
    parser = command_line(__doc__)
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/gpu_7b"), help="parts hand over through this folder"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="for all parts together")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    lines = []
    for part in arguments.part:
        left = 60 * arguments.minutes - (time.monotonic() - started)
        lines.append(run(part, arguments.shape, arguments.work.absolute(), min(left, PART_SECONDS)))
    print("\n".join(map(row, lines)))
    print(
        json.dumps(
            {"shape": arguments.shape, "seconds": time.monotonic() - started, "parts": lines}
        )
    )


if __name__ == "__main__":
    main()
