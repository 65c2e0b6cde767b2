"""One driver a run: who is refused, and which locks are stale. In a folder; a URI's is in `test_object_store.py`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import away, with_key

from qpruner.errors import StorageError, UserError
from qpruner.runs.lock import HEARTBEAT_SECONDS, NAME, STALE_BEATS, hold_run, this_process
from qpruner.runs.records import RUN_ID

HOLD = """
import sys, time
from qpruner.errors import UserError
from qpruner.runs.lock import hold_run
from qpruner.runs.storage import run_path
try:
    with hold_run(run_path(sys.argv[1]), lambda text: print(text, flush=True), float(sys.argv[2])):
        print("held", flush=True)
        time.sleep(60)
except UserError:
    print("refused", flush=True)
"""
EXIT_7 = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
"""SIGTERM is handled, as in Ray's driver."""
ELSEWHERE = ["unshare", "--pid", "--fork", "--kill-child"]
"""Run in a process namespace of its own, as on another machine: whether it lives cannot be seen from here."""
THEIRS = this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"})


@contextmanager
def holding(
    run: Path | str, heartbeat_seconds: float = 10, place: Sequence[str] = (), program: str = HOLD
) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run, or is refused."""
    command = [*place, sys.executable, "-c", program, str(run), str(heartbeat_seconds)]
    if place and subprocess.run([*place, "true"], capture_output=True).returncode:
        pytest.skip("process namespaces are not permitted here")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def word(process: subprocess.Popen[str]) -> str:
    """The next line that a process says."""
    assert process.stdout
    return process.stdout.readline().strip()


def held(root: Path, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> list[str]:
    """Take the lock and give it back; returns what was notified."""
    notes: list[str] = []
    with hold_run(root, notes.append, heartbeat_seconds):
        pass
    return notes


def test_second_driver_is_refused_and_dead_ones_lock_taken(tmp_path: Path) -> None:
    with holding(tmp_path) as first:
        assert word(first) == "held"
        with pytest.raises(UserError, match=rf"`output`.*process {first.pid} on {socket.gethostname()} since.*wait"):
            held(tmp_path)
        first.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # dead, and still listed: nobody has asked how it ended
        assert held(tmp_path) == [
            f"taking over from process {first.pid} on {socket.gethostname()}: that process is dead"
        ]
    assert held(tmp_path) == [] and list(tmp_path.iterdir()) == [], "a driver that is done leaves no lock"


@pytest.mark.parametrize(
    ("lock", "taken"),
    [
        pytest.param(this_process().model_copy(update={"started": 1}), "that process is dead", id="reused-number"),
        # Its process number says nothing here: there is one like it, our own.
        pytest.param(THEIRS, f"on gpu-7: no sign of life for {2 * STALE_BEATS * HEARTBEAT_SECONDS:.0f} s", id="silent"),
        pytest.param(None, None, id="cut-short"),
    ],
)
def test_a_stale_lock_is_taken_at_once(lock: Any, taken: str | None, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text(lock.model_dump_json() if lock else '{"host": "gpu')
    then = time.time() - 2 * STALE_BEATS * HEARTBEAT_SECONDS
    os.utime(path, (then, then))
    notes = held(tmp_path)
    assert [taken in note for note in notes] == [True] if taken else not notes


def test_a_live_driver_elsewhere_is_refused_at_its_heartbeat(tmp_path: Path) -> None:
    notes: list[str] = []
    with holding(tmp_path, 0.5, ELSEWHERE) as first:
        assert word(first) == "held"
        refused = pytest.raises(UserError, match=rf"by process 1 on {socket.gethostname()} since .*; wait")
        with refused, hold_run(tmp_path, notes.append, 0.5):
            pass
        assert first.poll() is None
    (waiting,) = notes
    assert waiting.startswith(f"waiting up to 3 s for a sign of life of process 1 on {socket.gethostname()}, which")


def test_of_two_that_wait_for_a_dead_driver_elsewhere_one_holds(tmp_path: Path) -> None:
    """As the next job of a chain meets the last one's, whose machine was lost."""
    with holding(tmp_path, 0.5, ELSEWHERE) as first:
        assert word(first) == "held"
        first.kill()
        with holding(tmp_path, 0.5) as one, holding(tmp_path, 0.5) as two:
            said = []
            for process in (one, two):
                while (line := word(process)).startswith(("waiting up to 3 s", "taking over from process 1")):
                    pass
                said.append(line)
    assert sorted(said) == ["held", "refused"]


def test_of_several_drivers_at_once_one_holds_the_run(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(this_process().model_copy(update={"pid": 2**22 + 1}).model_dump_json())
    with holding(tmp_path) as one, holding(tmp_path) as two, holding(tmp_path) as three:
        lines = []
        for process in (one, two, three):
            said = word(process)
            lines.append(word(process) if said.startswith("taking over") else said)
    assert sorted(lines) == ["held", "refused", "refused"]


def test_who_lost_the_run_ends_and_leaves_the_others_lock(tmp_path: Path) -> None:
    """As after a laptop slept through another machine's taking over; a storage that is away is no such thing."""
    lock, run_id = tmp_path / NAME, tmp_path / RUN_ID
    run_id.write_text("this run")
    with holding(tmp_path, heartbeat_seconds=0.05) as process:
        assert word(process) == "held"
        for _ in range(2):
            os.utime(lock, (0, 0))
            deadline = time.monotonic() + 60
            while not lock.stat().st_mtime:
                assert time.monotonic() < deadline, "no heartbeat"
                time.sleep(0.02)
            out_of_sight = [(path.rename(path.with_name(f"away-{path.name}")), path) for path in (run_id, lock)]
            time.sleep(0.5)
            for aside, path in reversed(out_of_sight):
                aside.rename(path)
        (new := lock.with_name("new")).write_text(THEIRS.model_dump_json())
        new.rename(lock)
        assert word(process) == f"process {os.getpid()} on gpu-7 took this run over"
        assert process.wait(timeout=20) == -signal.SIGTERM
    assert lock.read_text() == THEIRS.model_dump_json()


def test_who_slept_through_anothers_whole_run_ends(tmp_path: Path) -> None:
    """By then there is no lock to see, and there is no new one either."""
    (tmp_path / RUN_ID).write_text("this run")
    with holding(tmp_path, 0.5, ELSEWHERE, EXIT_7 + HOLD) as process:
        assert word(process) == "held"
        (sleeper,) = psutil.Process(process.pid).children()
        sleeper.suspend()
        assert "taking over" in held(tmp_path, 0.5)[-1] and not (tmp_path / NAME).exists()
        sleeper.resume()
        assert word(process).startswith("the lock is gone: another driver took this run over and is done with it, or")
        assert process.wait(timeout=20) == 7
    assert [path.name for path in tmp_path.iterdir()] == [RUN_ID]


def test_a_storage_away_at_the_start_is_told_with_its_remedy(tmp_path: Path) -> None:
    with away(tmp_path) as back:
        with pytest.raises(
            StorageError, match=rf"{tmp_path}/.*{NAME}.* cannot be reached .*\n.*bring the storage back"
        ):
            held(tmp_path)
        back()


def test_the_command_is_refused_with_exit_code_2(tiny_raw: dict[str, Any], write_yaml: Any, tmp_path: Path) -> None:
    """Also a quiet one says on stderr whom it waits for before."""
    root = tmp_path / "run"
    root.mkdir()
    config = write_yaml(with_key(tiny_raw, "output", str(root)))
    command = [sys.executable, "-m", "qpruner", "prepare", str(config), "--json"]
    with holding(root, 0.5, ELSEWHERE) as first:
        assert word(first) == "held"
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    waiting, refusal = done.stderr.splitlines()[:2]
    assert waiting.startswith("[run] waiting up to 60 s for a sign of life of process 1 on ")
    assert f"process 1 on {socket.gethostname()}" in refusal
    assert done.returncode == 2 and json.loads(done.stdout)["status"] == "error"
    assert not (root / "records").exists()
