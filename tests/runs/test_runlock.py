"""One driver a run folder: who is refused, and which locks are stale."""

from __future__ import annotations

import fcntl
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
from typing import IO, Any

import psutil
import pytest
from conftest import away, with_key

from qpruner.errors import StorageError, UserError
from qpruner.runs.lock import HEARTBEAT_SECONDS, NAME, STALE_BEATS, sole_driver, this_process
from qpruner.runs.records import RUN_ID

HOLD = """
import sys, time
from pathlib import Path
from qpruner.errors import UserError
from qpruner.runs.lock import sole_driver
try:
    with sole_driver(Path(sys.argv[1]), lambda text: print(text, flush=True), float(sys.argv[2])):
        print("held", flush=True)
        time.sleep(60)
except UserError:
    print("refused", flush=True)
"""


ELSEWHERE = ["unshare", "--pid", "--fork", "--kill-child"]
"""Run in a process namespace of its own, as on another machine: whether it lives cannot be seen from here."""


@contextmanager
def another(root: Path, heartbeat_seconds: float = 10, place: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run, or is refused."""
    command = [*place, sys.executable, "-c", HOLD, str(root), str(heartbeat_seconds)]
    if place and subprocess.run([*place, "true"], capture_output=True).returncode:
        pytest.skip("process namespaces are not permitted here")
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
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # dead, and still listed: nobody has asked how it ended
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


def test_a_driver_that_lives_on_another_machine_is_refused_at_its_next_heartbeat(tmp_path: Path) -> None:
    told: list[str] = []
    with another(tmp_path, 0.5, ELSEWHERE) as first:
        assert word(first) == "held"
        refused = pytest.raises(UserError, match=rf"by process 1 on {socket.gethostname()} since .*; wait")
        with refused, sole_driver(tmp_path, told.append, 0.5):
            pass
        assert first.poll() is None
    (waiting,) = told
    assert waiting.startswith(f"waiting up to 3 s for a sign of life of process 1 on {socket.gethostname()}, which")


def test_a_driver_that_has_just_died_on_another_machine_is_waited_for_and_then_taken_over_from(tmp_path: Path) -> None:
    """As the next job of a chain meets the last one's, whose machine was lost: it is not refused."""
    told: list[str] = []
    with another(tmp_path, 0.5, ELSEWHERE) as first:
        assert word(first) == "held"
        first.kill()
        with sole_driver(tmp_path, told.append, 0.5):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    waiting, taken = told
    assert waiting.startswith("waiting up to 3 s for a sign of life of process 1 on ")
    assert taken.startswith(f"taking over from process 1 on {socket.gethostname()}: no sign of life for ")


def test_a_driver_that_died_on_another_machine_long_ago_is_not_waited_for(tmp_path: Path) -> None:
    """Its process number says nothing here: there is one like it, our own."""
    lock = tmp_path / NAME
    lock.write_text(this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"}).model_dump_json())
    then = time.time() - 2 * STALE_BEATS * HEARTBEAT_SECONDS
    os.utime(lock, (then, then))
    (taken,) = held(tmp_path)
    assert f"on gpu-7: no sign of life for {2 * STALE_BEATS * HEARTBEAT_SECONDS:.0f} s" in taken


def test_of_two_that_wait_for_a_dead_driver_one_holds_the_run(tmp_path: Path) -> None:
    with another(tmp_path, 0.5, ELSEWHERE) as first:
        assert word(first) == "held"
        first.kill()
        with another(tmp_path, 0.5) as one, another(tmp_path, 0.5) as two:
            said = []
            for process in (one, two):
                while (line := word(process)).startswith(("waiting", "taking over")):
                    pass
                said.append(line)
    assert sorted(said) == ["held", "refused"]


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


@contextmanager
def judged(lock: Path) -> Iterator[IO[str]]:
    """The lock file while a driver judges and changes it, as this test does here in another one's place."""
    with lock.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def wait_at(lock: Path, process: subprocess.Popen[str]) -> None:
    """Until a process has the lock file open."""
    deadline = time.monotonic() + 60
    while str(lock) not in [each.path for each in psutil.Process(process.pid).open_files()]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)


def test_who_comes_while_another_takes_the_run_waits_for_what_it_writes(tmp_path: Path) -> None:
    lock = tmp_path / NAME
    with judged(lock) as file, another(tmp_path) as process:
        wait_at(lock, process)
        file.write(this_process().model_dump_json())
        file.flush()
        fcntl.flock(file, fcntl.LOCK_UN)
        assert word(process) == "refused"


def test_who_waited_for_a_lock_that_is_gone_makes_a_new_one(tmp_path: Path) -> None:
    """As when the driver before is done in that instant; what is written to its file would be seen by nobody."""
    lock = tmp_path / NAME
    with judged(lock) as file, another(tmp_path) as process:
        wait_at(lock, process)
        lock.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)
        assert word(process) == "held"
        assert json.loads(lock.read_text())["pid"] == process.pid


def test_a_run_that_another_took_over_stays_that_ones(tmp_path: Path) -> None:
    lock = tmp_path / NAME
    theirs = this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"}).model_dump_json()
    with sole_driver(tmp_path, print):
        lock.write_text(theirs)
    assert lock.read_text() == theirs


def test_the_heartbeat_goes_on_and_who_lost_the_run_ends(tmp_path: Path) -> None:
    """As after a laptop slept through another machine's taking over; a storage that is away is no such thing."""
    lock, run_id = tmp_path / NAME, tmp_path / RUN_ID
    run_id.write_text("this run")
    theirs = this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"}).model_dump_json()
    with another(tmp_path, heartbeat_seconds=0.05) as process:
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
        # In one step: a heartbeat that meets an empty file says so instead.
        (new := lock.with_name("new")).write_text(theirs)
        new.rename(lock)
        assert word(process) == f"process {os.getpid()} on gpu-7 took this run over"
        assert process.wait(timeout=20) == -signal.SIGTERM
    assert lock.read_text() == theirs, "the other's lock is left alone"


def test_who_slept_through_all_that_another_did_on_its_run_ends(tmp_path: Path) -> None:
    """By then there is no lock to see. The signal is handled, as in Ray's driver: not even then is there a new lock."""
    (tmp_path / RUN_ID).write_text("this run")
    handler = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    command = [*ELSEWHERE, sys.executable, "-c", handler + HOLD, str(tmp_path), "0.5"]
    if subprocess.run([*ELSEWHERE, "true"], capture_output=True).returncode:
        pytest.skip("process namespaces are not permitted here")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert word(process) == "held"
            (sleeper,) = psutil.Process(process.pid).children()
            sleeper.suspend()
            told: list[str] = []
            with sole_driver(tmp_path, told.append, 0.5):
                pass
            assert "taking over" in told[-1] and not (tmp_path / NAME).exists()
            sleeper.resume()
            assert word(process).startswith(
                "the lock is gone: another driver took this run over and is done with it, or"
            )
            assert process.wait(timeout=20) == 7
        finally:
            process.kill()
    assert [path.name for path in tmp_path.iterdir()] == [RUN_ID]


def test_a_storage_that_is_away_when_the_run_is_taken_is_told_with_its_remedy(tmp_path: Path) -> None:
    with away(tmp_path) as back:
        with pytest.raises(StorageError, match=rf"{tmp_path / NAME} cannot be reached .*\n.*bring the storage back"):
            held(tmp_path)
        back()


def test_the_command_is_refused_with_exit_code_2(tiny_raw: dict[str, Any], write_yaml: Any, tmp_path: Path) -> None:
    """Also a quiet one says on stderr whom it waits for before."""
    root = tmp_path / "run"
    root.mkdir()
    config = write_yaml(with_key(tiny_raw, "output", str(root)))
    command = [sys.executable, "-m", "qpruner", "prepare", str(config), "--json"]
    with another(root, 0.5, ELSEWHERE) as first:
        assert word(first) == "held"
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    waiting, refusal = done.stderr.splitlines()[:2]
    assert waiting.startswith("[run] waiting up to 60 s for a sign of life of process 1 on ")
    assert f"process 1 on {socket.gethostname()}" in refusal
    assert done.returncode == 2 and json.loads(done.stdout)["status"] == "error"
    assert not (root / "records").exists()
