"""One driver a run folder: who is refused, and which locks are stale."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import with_key
from real_driver import driver

from qpruner.errors import UserError
from qpruner.runlock import NAME, STALE_SECONDS, sole_driver, this_process

HOLD = """
import sys, time
from pathlib import Path
from qpruner.errors import UserError
from qpruner.runlock import sole_driver
try:
    with sole_driver(Path(sys.argv[1]), lambda text: print(text, flush=True), float(sys.argv[2])):
        print("held", flush=True)
        time.sleep(60)
except UserError:
    print("refused", flush=True)
"""


@contextmanager
def another(root: Path, heartbeat_seconds: float = 10) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run, or is refused."""
    command = [sys.executable, "-c", HOLD, str(root), str(heartbeat_seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def word(process: subprocess.Popen[str]) -> str:
    """The first thing a process says."""
    assert process.stdout
    return process.stdout.readline().strip()


def held(root: Path) -> list[str]:
    """Take the lock and give it back; returns what was told."""
    told: list[str] = []
    with sole_driver(root, told.append):
        pass
    return told


def test_the_second_driver_is_refused_with_the_firsts_host_and_pid(tmp_path: Path) -> None:
    with another(tmp_path) as first:
        assert word(first) == "held"
        with pytest.raises(UserError, match=rf"`output`.*process {first.pid} on {socket.gethostname()} since.*wait"):
            held(tmp_path)
    assert len(held(tmp_path)) == 1


def test_a_driver_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    with another(tmp_path) as first:
        assert word(first) == "held"
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert held(tmp_path) == [
            f"taking over from process {first.pid} on {socket.gethostname()}: that process is dead"
        ]


def test_a_driver_that_is_done_leaves_no_lock(tmp_path: Path) -> None:
    assert held(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_number_of_a_dead_one_is_not_it(tmp_path: Path) -> None:
    dead = this_process().model_copy(update={"started": 1})
    (tmp_path / NAME).write_text(dead.model_dump_json())
    assert "that process is dead" in held(tmp_path)[0]


@pytest.mark.parametrize(("silent_seconds", "is_stale"), [(STALE_SECONDS / 2, False), (STALE_SECONDS * 2, True)])
def test_another_machines_driver_is_judged_by_its_heartbeat(
    silent_seconds: float, is_stale: bool, tmp_path: Path
) -> None:
    """Its process number says nothing here: there is one like it, our own."""
    lock = tmp_path / NAME
    lock.write_text(this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"}).model_dump_json())
    then = time.time() - silent_seconds
    os.utime(lock, (then, then))
    if is_stale:
        assert f"on gpu-7: no sign of life for {silent_seconds:.0f} s" in held(tmp_path)[0]
    else:
        with pytest.raises(UserError, match="on gpu-7"):
            held(tmp_path)


def test_a_lock_that_was_cut_short_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"host": "gpu')
    assert held(tmp_path) == []


def test_of_several_drivers_started_at_once_one_holds_the_run(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(this_process().model_copy(update={"pid": 2**22 + 1}).model_dump_json())
    with another(tmp_path) as one, another(tmp_path) as two, another(tmp_path) as three:
        lines = []
        for process in (one, two, three):
            said = word(process)
            lines.append(word(process) if said.startswith("taking over") else said)
    assert sorted(lines) == ["held", "refused", "refused"]


def test_the_heartbeat_goes_on_and_who_lost_the_run_ends(tmp_path: Path) -> None:
    """As after a laptop slept through another machine's taking over."""
    lock = tmp_path / NAME
    theirs = this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"}).model_dump_json()
    with another(tmp_path, heartbeat_seconds=0.05) as process:
        assert word(process) == "held"
        os.utime(lock, (0, 0))
        time.sleep(1)
        assert time.time() - lock.stat().st_mtime < 30
        lock.write_text(theirs)
        assert word(process) == f"process {os.getpid()} on gpu-7 took this run over"
        assert process.wait(timeout=20) == -signal.SIGTERM
    assert lock.read_text() == theirs, "the other's lock is left alone"


def test_the_command_is_refused_with_exit_code_2(tiny_raw: dict[str, Any], write_yaml: Any, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    config = write_yaml(with_key(tiny_raw, "output", str(root)))
    with sole_driver(root, print), driver(config, verb="prepare") as process:
        code, said = process.end()
    assert code == 2 and f"process {os.getpid()} on {socket.gethostname()}" in said
    assert not (root / "records").exists()
