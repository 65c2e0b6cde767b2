"""Run a real `qpruner` process, send it signals, and read its run folder meanwhile."""

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
from conftest import Raw, raw_config, with_keys

MINUTES = 60.0


def config_file(model: Path, folder: Path, **keys: Any) -> Path:
    """Write a configuration file with these keys; the run folder is next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(with_keys(raw_config(model, folder / "run"), **keys)))
    return path


def search_config(model: Path, folder: Path, **keys: Any) -> Path:
    """Write a configuration whose trials have four rungs and take a few seconds."""
    settings = {
        "sensitivity.methods": ["mutual_information", "first_order"],
        "search.steps": 32,
        "search.first_rung": 4,
        "search.max_concurrent": 1,
    }
    return config_file(model, folder, **settings | keys)


@dataclass
class Driver:
    """A running `qpruner` process."""

    process: subprocess.Popen[str]
    run: Path
    out: Path

    def wait_until(self, condition: Callable[[], Any], what: str, minutes: float = 10) -> Any:
        """Wait for a condition while the process runs; return its value."""
        deadline = time.monotonic() + minutes * MINUTES
        while not (found := condition()):
            assert self.process.poll() is None, (
                f"the run ended before {what}: {self.said()[-3000:]}"
            )
            assert time.monotonic() < deadline, (
                f"no {what} after {minutes} minutes: {self.said()[-3000:]}"
            )
            time.sleep(0.02)
        return found

    def end(self, minutes: float = 10) -> tuple[int, str]:
        """Wait for the process to end; return the exit code and the output."""
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
        """Send Ctrl-C to the process group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)


@contextmanager
def driver(
    config: Path,
    *options: str,
    verb: str = "search",
    inside: Sequence[str] = (),
    before: str = "",
    **environment: str,
) -> Iterator[Driver]:
    """Start a command, with `inside` before it and after the Python `before`; kill all its
    processes at the end."""
    run = Path(yaml.safe_load(config.read_text())["output"])
    program = (
        ("-c", f"{before}\nfrom qpruner.cli.main import main\nmain()")
        if before
        else ("-m", "qpruner")
    )
    # Not in the folder, which may be a file system that a test fills.
    out = config.parent.parent / f"out-{time.monotonic_ns()}.txt"
    with out.open("w") as file:
        process = subprocess.Popen(
            [*inside, sys.executable, *program, verb, str(config), "--json", *options],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            process_group=0,
            # If the tests run in the background, they and their processes ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    descendants: list[psutil.Process] = []
    try:
        yield Driver(process, run, out)
    finally:
        with suppress(psutil.NoSuchProcess):
            descendants += psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in descendants:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def ended(config: Path, verb: str = "search") -> Driver:
    """Run an undisturbed command, which must succeed."""
    with driver(config, verb=verb) as process:
        process.end_well()
    return process


def trials_of(run: Path) -> dict[int, Raw]:
    """Read the records of the trials, by index."""
    found = {}
    for path in sorted(run.glob("trials/*/*/trial.json")):
        with suppress(FileNotFoundError):  # withdrawn meanwhile
            trial = json.loads(path.read_text())
            found[trial["index"]] = trial
    return found


def rungs_of(run: Path) -> dict[int, list[Raw]]:
    """Read the rungs of the trials, by index."""
    return {index: trial["rungs"] for index, trial in trials_of(run).items()}


def search_record(run: Path) -> Raw:
    return json.loads((run / "records" / "search.json").read_text())


def between_rungs(run: Path, index: int) -> int | None:
    """Return the process id of a trial that is between two rungs, else None."""
    trial = trials_of(run).get(index)
    if trial is None or trial["status"] != "running" or not trial["rungs"]:
        return None
    pulse = pulse_of(run, index)
    return pulse["pid"] if pulse else None


def pulse_of(run: Path, index: int) -> Raw | None:
    """Read the last progress of the worker of a trial."""
    path = next(run.glob(f"trials/*/{index:04d}/pulse.json"), None)
    return json.loads(path.read_text()) if path else None
