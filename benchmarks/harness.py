"""What the benchmarks share: command lines, rows that are kept in a file, turns, tables.

It imports the standard library alone, since `gpu_kit.py` packs it too.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def command_line(doc: str | None, overrides: bool = False) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring, with `--set KEY=VALUE` if asked for."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if overrides:
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            dest="overrides",
            metavar="KEY=VALUE",
            help="override a key of the configuration; repeatable",
        )
    return parser


def read_records(file: Path) -> list[Record]:
    """Read a file with one JSON object a line; return no records if there is no file."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def append_record(file: Path, record: Record) -> None:
    """Add one record to the end of a file."""
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def run_for_record(command: Sequence[str]) -> Record:
    """Run a command whose last line of output is a JSON object, and return that object."""
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    record: Record = json.loads(finished.stdout.splitlines()[-1])
    return record


def fresh_processes(
    number: int, initializer: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """Return a pool of processes that share no state with this one."""
    return ProcessPoolExecutor(number, get_context("spawn"), initializer, arguments)


def in_turns(
    work: dict[str, Callable[[], Any]],
    turns: int,
    warm_up: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time several pieces of work one after the other, again and again.

    Return the seconds of each piece by name, without those of the `warm_up` turns, which come in
    addition to `turns`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm_up + turns):
        for name, piece in work.items():
            started = now()
            piece()
            if turn >= warm_up:
                seconds[name].append(now() - started)
    return seconds


def median_and_range(values: Sequence[float], form: str = ".2f") -> str:
    """Show the median of some values, with the least and the greatest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def print_heading(names: Sequence[str]) -> None:
    """Print the first two lines of a Markdown table."""
    print_row(names)
    print("|---" * len(names) + "|", flush=True)


def print_row(cells: Iterable[object]) -> None:
    """Print one row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
