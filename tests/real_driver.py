"""A real `qpruner` process for the tests that send it signals, and what its run folder says meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from conftest import raw_config, with_keys

MINUTES = 60.0


def config_file(model: Path, folder: Path, **keys: Any) -> Path:
    """A configuration file with these keys, in the folder that its run folder is in."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(with_keys(raw_config(model, folder / "run"), **keys)))
    return path


def search_config(model: Path, folder: Path, **keys: Any) -> Path:
    """A configuration file whose trials have four rungs and take a few seconds."""
    settings = {
        "sensitivity.methods": ["mutual_information", "first_order"],
        "search.steps": 32,
        "search.first_rung": 4,
        "search.max_concurrent": 1,
    }
    return config_file(model, folder, **settings | keys)


@dataclass
class Driver:
    """A `qpruner` process and what became of it."""

    process: subprocess.Popen[str]
    run: Path
    out: Path

    def wait_until(self, condition: Callable[[], Any], what: str, minutes: float = 10) -> Any:
        """Wait for something that happens while the driver lives; returns what the condition gave."""
        deadline = time.monotonic() + minutes * MINUTES
        while not (found := condition()):
            assert self.process.poll() is None, f"the run ended before {what}: {self.said()[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} after {minutes} minutes: {self.said()[-3000:]}"
            time.sleep(0.02)
        return found

    def end(self, minutes: float = 10) -> tuple[int, str]:
        """Wait for the end; returns the exit code and all that was said."""
        code = self.process.wait(timeout=minutes * MINUTES)
        return code, self.said()

    def end_well(self) -> str:
        """Wait for the end, which must be a success; returns all that was said."""
        code, said = self.end()
        assert code == 0, said[-3000:]
        return said

    def said(self) -> str:
        return self.out.read_text()

    def interrupt(self) -> None:
        """Ctrl-C, which a terminal sends to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)


@contextmanager
def driver(
    config: Path, *options: str, verb: str = "search", inside: Sequence[str] = (), **environment: str
) -> Iterator[Driver]:
    """Start the command, `inside` another machine if that is given; at the end nothing of it is left, also when the
    test fails."""
    run = Path(yaml.safe_load(config.read_text())["output"])
    # Beside the folder, which may be a file system of its own that a test fills.
    out = config.parent.parent / f"out-{time.monotonic_ns()}.txt"
    with out.open("w") as file:
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", "qpruner", verb, str(config), "--json", *options],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            process_group=0,
            # Tests that were started in the background ignore Ctrl-C, and what they start would, too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    descendants: set[psutil.Process] = set()
    try:
        yield Driver(process, run, out)
        with suppress(psutil.NoSuchProcess):
            descendants.update(psutil.Process(process.pid).children(recursive=True))
    finally:
        with suppress(psutil.NoSuchProcess):
            descendants.update(psutil.Process(process.pid).children(recursive=True))
        process.kill()
        process.wait()
        for child in descendants:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def ended(config: Path, verb: str = "search") -> Driver:
    """A command that nothing happened to, after its end."""
    with driver(config, verb=verb) as process:
        process.end_well()
    return process


def trials_of(run: Path) -> dict[int, dict[str, Any]]:
    """The trials' records by number."""
    found = {}
    for path in sorted(run.glob("trials/*/*/trial.json")):
        with suppress(FileNotFoundError):  # withdrawn meanwhile
            trial = json.loads(path.read_text())
            found[trial["index"]] = trial
    return found


def rungs_of(run: Path) -> dict[int, list[dict[str, Any]]]:
    """What the trials measured, by number."""
    return {index: trial["rungs"] for index, trial in trials_of(run).items()}


def search_record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "records" / "search.json").read_text())
    return found


def between_rungs(run: Path, index: int) -> int | None:
    """The process of a trial that has a rung behind it and one before it, None at other times."""
    trial = trials_of(run).get(index)
    if trial is None or trial["status"] != "running" or not trial["rungs"]:
        return None
    pulse = pulse_of(run, index)
    return pulse["pid"] if pulse else None


def pulse_of(run: Path, index: int) -> dict[str, Any] | None:
    """The last sign of life of a trial's worker."""
    path = next(run.glob(f"trials/*/{index:04d}/pulse.json"), None)
    return json.loads(path.read_text()) if path else None
