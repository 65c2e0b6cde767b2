"""Which process works on a run, according to its lock: real processes that run, are stopped or
killed."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import command
from made_run import recorded_run
from test_lock import holding, word

from qpruner.report.snapshot import read_snapshot
from qpruner.runs.lock import NAME, hold_run, this_process
from qpruner.runs.run_dir import RunDir

GO_ON = "repeat the command to go on, in /somewhere: qpruner run config.yaml"


@contextmanager
def driver(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the run, and write the state of a search that began long ago."""
    root.mkdir()
    with holding(root) as process:
        assert word(process) == "held"
        recorded_run(root, pid=process.pid)
        yield process


def status(root: Path) -> list[str]:
    """Return the lines of `qpruner status`, and check that it leaves the folder unchanged."""
    before = {path.name: path.stat().st_mtime_ns for path in root.iterdir()}
    said = command("status", root)
    assert said.exit_code == 0, said.output
    assert {path.name: path.stat().st_mtime_ns for path in root.iterdir()} == before
    return said.stdout.splitlines()


def standing(root: Path) -> str:
    return read_snapshot(RunDir(root, create=False)).standing


def stage_line(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("search"))


def lock_of_another_machine(root: Path, seconds_ago: float) -> None:
    """Write a run whose driver is on another machine, with this process's number and a heartbeat at
    that time."""
    recorded_run(root)
    (root / NAME).write_text(
        this_process().model_copy(update={"machine": "elsewhere"}).model_dump_json()
    )
    then = time.time() - seconds_ago
    os.utime(root / NAME, (then, then))


def test_a_stopped_driver_is_running_and_a_killed_one_cut_off(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with driver(root) as process:
        process.send_signal(signal.SIGSTOP)
        os.utime(root / NAME, (0, 0))
        lines = status(root)
        who = f"running on {this_process().host} (process {process.pid})"
        assert f"{who}, last sign of life" in lines[0]
        assert "running" in stage_line(lines)
        assert f"{who} when this was written" in standing(root)
        process.kill()
        process.wait()
        lines = status(root)
        assert lines[0].endswith(f"cut off; {GO_ON}")
        assert "cut off" in stage_line(lines)
        assert standing(root).endswith("its process is cut off; repeat the command to resume.")


def test_a_driver_elsewhere_runs_while_it_beats(tmp_path: Path) -> None:
    root = tmp_path / "run"
    lock_of_another_machine(root, seconds_ago=30)
    assert "running on" in status(root)[0]
    lock_of_another_machine(root, seconds_ago=9 * 3600)
    lines = status(root)
    assert "no sign of life for 9 h" in lines[0]
    assert lines[0].endswith(f": most likely gone; {GO_ON}")
    assert "most likely gone" in stage_line(lines)
    assert "most likely gone; repeat the command" in standing(root)


def test_a_driver_is_named_before_its_first_stage(tmp_path: Path) -> None:
    """The first command of a run checks the cluster and the model before it writes `run.json`."""
    root = recorded_run(tmp_path / "run", pid=2**22 + 1)
    with hold_run(root, print):
        lines = status(root)
        (root / "run.json").unlink()
        said = command("status", root)
    assert f"running on {this_process().host} (process {os.getpid()})" in lines[0], (
        "not the process before it"
    )
    assert said.exit_code == 2
    assert (
        f"has no run.json yet: a command is starting there (process {os.getpid()} on "
        in said.stderr
    )


def test_without_its_process_a_command_is_cut_off_or_done(tmp_path: Path) -> None:
    """The process released its lock, but its disk was full; or its number is another process's."""
    root = recorded_run(tmp_path / "run")
    assert status(root)[0].endswith(f"cut off; {GO_ON}")
    (root / NAME).write_text(this_process().model_copy(update={"started": 1}).model_dump_json())
    assert status(root)[0].endswith(f"cut off; {GO_ON}")
    (root / "run.json").unlink()
    assert "is not a run folder" in command("status", root).stderr, "that process is dead"
    assert status(recorded_run(tmp_path / "over", is_over=True))[0].endswith(": done")


def test_a_folder_without_a_run_is_refused_with_a_hint(tmp_path: Path) -> None:
    def said(place: Path) -> str:
        done = command("status", place)
        assert done.exit_code == 2
        return done.stderr

    (tmp_path / "runs" / "notes").mkdir(parents=True)
    assert f"{tmp_path}/runs/demo does not exist" in said(tmp_path / "runs" / "demo")
    assert "runs is not a run folder, because it has no run.json: name the folder" in said(
        tmp_path / "runs"
    )
