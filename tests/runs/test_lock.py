"""One driver a run: who is refused, and which locks are stale."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from qpruner.errors import UserError
from qpruner.runs.lock import HEARTBEAT_SECONDS, NAME, Holder, driver_of, hold_run, this_process
from qpruner.runs.records import RUN_ID
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import files_in, storage_at, write_text

HOLD = """
import sys, time
from qpruner.errors import UserError
from qpruner.runs.lock import hold_run
from qpruner.runs.storage import run_path
try:
    with hold_run(run_path(sys.argv[1]), lambda text: print(text, flush=True), float(sys.argv[2])):
        print("held", flush=True)
        # One long sleep would miss a signal that arrives just before it begins.
        for _ in range(600):
            time.sleep(0.1)
except UserError:
    print("refused", flush=True)
"""
EXIT_7 = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
"""First lines of a program that handles SIGTERM, as Ray's driver does."""
ELSEWHERE = ["unshare", "--pid", "--fork", "--kill-child"]
"""Runs a command in its own process namespace: as on another machine, nobody here sees whether it
is alive."""
THEIRS = this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"})
HERE = socket.gethostname()


@contextmanager
def holding(
    run: Path | str, heartbeat_seconds: float = 10, place: Sequence[str] = (), program: str = HOLD
) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds the run, or is refused."""
    command = [*place, sys.executable, "-c", program, str(run), str(heartbeat_seconds)]
    if place and subprocess.run([*place, "true"], capture_output=True).returncode:
        pytest.skip("process namespaces are not permitted here")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def word(process: subprocess.Popen[str]) -> str:
    """Read the next line that a process prints."""
    return process.stdout.readline().strip()


def held(root: Path, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> list[str]:
    """Take the lock and release it; return the notifications."""
    notes = []
    with hold_run(root, notes.append, heartbeat_seconds):
        return notes


def test_second_driver_is_refused_and_dead_ones_lock_taken(run_dir: RunDir) -> None:
    root = run_dir.root
    with holding(run_dir.place) as first:
        assert word(first) == "held"
        before = files_in(root)
        process = rf"process {first.pid} on {HERE} since"
        by_whom = rf"`output`: {run_dir.place} is being worked on by {process}.*wait"
        with pytest.raises(UserError, match=by_whom):
            held(root)
        found = driver_of(root)
        assert found.holder.pid == first.pid
        assert found.state == "alive"
        # Looking writes nothing.
        assert files_in(root) == before
        first.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie: dead, but still listed
        assert held(root) == [
            f"taking over from process {first.pid} on {HERE}: that process is dead"
        ]
    # A driver that is done leaves no lock.
    assert held(root) == []
    assert files_in(root) == {}
    assert driver_of(root) is None


@pytest.mark.parametrize(
    ("lock", "notes"),
    [
        pytest.param(
            this_process().model_copy(update={"started": 1}),
            ["that process is dead"],
            id="reused-number",
        ),
        # Its process id is that of this test, which means nothing on another machine.
        pytest.param(THEIRS, ["gpu-7, which", "on gpu-7: no sign of life for 1 s"], id="silent"),
        pytest.param(None, [], id="cut-short"),
    ],
)
def test_a_stale_lock_is_taken(lock: Holder | None, notes: list[str], tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(lock.model_dump_json() if lock else '{"host": "gpu')
    found = held(tmp_path, 0.2)
    assert len(found) == len(notes)
    assert all(part in note for part, note in zip(notes, found, strict=True))


@pytest.mark.parametrize(("age", "state"), [(50, "alive"), (70, "silent")])
def test_a_driver_elsewhere_is_silent_after_a_minute(age: int, state: str, tmp_path: Path) -> None:
    write_text(tmp_path / NAME, THEIRS.model_dump_json())
    os.utime(tmp_path / NAME, (time.time() - age,) * 2)
    driver = driver_of(tmp_path)
    assert driver.state == state


def test_a_live_driver_elsewhere_holds_the_run_until_it_dies(run_dir: RunDir) -> None:
    notes = []
    with holding(run_dir.place, 0.5, ELSEWHERE) as first:
        assert word(first) == "held"
        refused = pytest.raises(UserError, match=rf"by process 1 on {HERE} since .*; wait")
        with refused, hold_run(run_dir.root, notes.append, 0.5):
            pass
        assert first.poll() is None
        first.kill()
    notes += held(run_dir.root, 0.5)
    waiting = f"waiting up to 3 s for a sign of life of process 1 on {HERE}"
    assert [note.partition(HERE)[0] + HERE for note in notes] == [waiting] * 2 + [
        f"taking over from process 1 on {HERE}"
    ]


@pytest.mark.parametrize("dead", [THEIRS, this_process().model_copy(update={"pid": 2**22 + 1})])
def test_only_one_of_several_takes_a_stale_lock(dead: Holder, tmp_path: Path) -> None:
    """Several jobs in a queue find the lock of the last one, whose machine was lost."""
    (tmp_path / NAME).write_text(dead.model_dump_json())
    with (
        holding(tmp_path, 0.5) as one,
        holding(tmp_path, 0.5) as two,
        holding(tmp_path, 0.5) as three,
    ):
        outcomes = []
        for process in (one, two, three):
            while (line := word(process)).startswith(
                ("waiting up to 3 s", "taking over from process")
            ):
                pass
            outcomes.append(line)
    assert sorted(outcomes) == ["held", "refused", "refused"]


def test_a_driver_that_lost_the_lock_ends_and_leaves_it(run_dir: RunDir) -> None:
    with holding(run_dir.place, 0.1, program=EXIT_7 + HOLD) as process:
        assert word(process) == "held"
        write_text(run_dir.root / NAME, THEIRS.model_dump_json())
        assert word(process).startswith("another driver took this run over, or ")
        assert process.wait(timeout=20) == 7
    assert Holder.model_validate_json(storage_at(run_dir.root / NAME).read()) == THEIRS


def test_a_storage_away_for_a_while_costs_no_lock(tmp_path: Path) -> None:
    lock = tmp_path / NAME
    run_id = tmp_path / RUN_ID
    run_id.write_text("this run")
    with holding(tmp_path, heartbeat_seconds=0.05) as process:
        assert word(process) == "held"
        for _ in range(2):
            os.utime(lock, (0, 0))
            deadline = time.monotonic() + 60
            while not lock.stat().st_mtime:
                assert time.monotonic() < deadline, "no heartbeat"
                time.sleep(0.02)
            out_of_sight = [
                (path.rename(path.with_name(f"away-{path.name}")), path) for path in (run_id, lock)
            ]
            time.sleep(0.5)
            for aside, path in reversed(out_of_sight):
                aside.rename(path)


def test_a_driver_suspended_during_a_whole_run_ends(tmp_path: Path) -> None:
    """A laptop slept: another driver took the lock and released it, and no new lock is made."""
    (tmp_path / RUN_ID).write_text("this run")
    with holding(tmp_path, 0.5, ELSEWHERE, EXIT_7 + HOLD) as process:
        assert word(process) == "held"
        [sleeper] = psutil.Process(process.pid).children()
        sleeper.suspend()
        assert "taking over" in held(tmp_path, 0.5)[-1]
        assert not (tmp_path / NAME).exists()
        sleeper.resume()
        assert word(process).startswith("another driver took this run over, or ")
        assert process.wait(timeout=20) == 7
    assert [path.name for path in tmp_path.iterdir()] == [RUN_ID]


def test_a_file_system_whose_locks_fail_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    message = (
        rf"`output`: file locks do not work on the file system of {tmp_path} "
        r"\(No locks available\); mount it with"
    )
    with pytest.raises(UserError, match=message):
        held(tmp_path)
