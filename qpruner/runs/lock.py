"""One driver a run: a file that says who works on it, and whose time of change is that process's heartbeat.

A lock is stale when its process is dead, if that can be seen from here, and else when its heartbeat has stopped: a
driver on another machine is waited for until it beats again, or would have. Ages are differences of the storage's own
times, so machines' clocks need not agree. Who slept through another's whole work finds no lock at all, and the run's
id beside it. An object store knows no locks: there two drivers that start in the same instant may both believe that
they hold the run, and the first heartbeat ends one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qpruner.errors import StageError, StorageError, UserError
from qpruner.runs.object_store import Objects, name_of, objects_at
from qpruner.runs.records import RUN_ID
from qpruner.runs.retry import patiently

NAME = "driver.lock"
HEARTBEAT_SECONDS = 10.0
STALE_BEATS = 6
"""Without so many heartbeats, another machine's driver is taken for dead."""


class Holder(BaseModel):
    """The process that works on a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str
    machine: str
    """Boot and process namespace: where these are equal, process numbers mean the same."""
    pid: int
    started: int
    """When the kernel started it, in clock ticks since boot: process numbers come again."""
    since: str


@dataclass(frozen=True)
class Driver:
    """The process that a run's lock names, as one sees it who only looks.

    Attributes:
        holder: The process.
        beat: When it gave its last sign of life, in Unix seconds on the storage's clock.
        state: `alive`; `dead` where this machine and boot has no such process any more; `silent` on another machine
            after a minute without a sign of life, so that the next command takes the run over.
    """

    holder: Holder
    beat: float
    state: Literal["alive", "dead", "silent"]


def driver_of(root: Path) -> Driver | None:
    """Who drives a run; None where nobody holds its lock.

    Nothing is written, so the storage's clock is not asked: a machine whose own is a minute ahead calls a driver
    elsewhere silent that is not, and one whose clock is behind notices its end later.

    Args:
        root: The run folder.

    Raises:
        StorageError: If the storage cannot be reached.
    """
    found = patiently(lambda: _last_sign(_lock_of(root)), root / NAME)
    if found is None:
        return None
    (holder, beat), me = found, this_process()
    if _stale(holder, me, lambda: time.time() - beat, STALE_BEATS * HEARTBEAT_SECONDS) is None:
        return Driver(holder, beat, "alive")
    return Driver(holder, beat, "dead" if holder.machine == me.machine else "silent")


@contextmanager
def sole_driver(
    root: Path, tell: Callable[[str], None], heartbeat_seconds: float = HEARTBEAT_SECONDS
) -> Iterator[Callable[[], bool]]:
    """Hold a run for this process, which ends at once (SIGTERM) if another took the run over while it was suspended.

    Hands out what asks whether the run is this process's still, which takes a storage that is away for a yes.

    Args:
        root: The run folder.
        tell: Told in one line when another machine's driver is waited for, a stale lock is taken over, or this one was.
        heartbeat_seconds: Time between signs of life.

    Raises:
        UserError: If another driver works on the run, with its host and pid.
        StorageError: If the storage is full or away.
    """
    lock, me = _lock_of(root), this_process()
    seen: tuple[Holder, float] | None = None
    # Tried once: what was written without an answer would look like another's.
    while found := patiently(lambda: _taken(lock, me, tell, STALE_BEATS * heartbeat_seconds), root / NAME, seconds=0.0):
        holder, _ = found
        if holder.machine == me.machine or (seen and found != seen):
            raise UserError(
                f"`output`: {name_of(root)} is being worked on by process {holder.pid} on {holder.host} since "
                f"{holder.since}; wait until it is done, stop it, or name another `output`"
            )
        if not seen:
            limit = STALE_BEATS * heartbeat_seconds
            text = f"waiting up to {limit:.0f} s for a sign of life of process {holder.pid} on {holder.host}"
            tell(f"{text}, which holds this run since {holder.since} and may be dead")
            seen = found
        time.sleep(heartbeat_seconds / 4)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(lock, me, tell, done, heartbeat_seconds), daemon=True)
    beating.start()

    def is_ours() -> bool:
        with contextlib.suppress(OSError, StorageError):
            return _lost(lock, me) is None
        return True

    try:
        yield is_ours
    finally:
        done.set()
        beating.join()
        # Asked before, too: whoever would be alone with a lock that is gone makes one.
        with contextlib.suppress(OSError, StorageError):
            if lock.holder() == me:
                with lock.alone():
                    if lock.holder() == me:
                        lock.give_up()


def taken_over(stage: str, how: str) -> StageError:
    """What a stage ends with whose driver slept, or was cut off, while another worked on its run.

    Args:
        stage: Its name.
        how: What shows it.
    """
    cause = f"another driver took this run over while this one gave no sign of life: {how}"
    remedy = (
        "leave the run to it (`qpruner status` tells where it stands); once that has ended, the same command goes on "
        "from what is recorded"
    )
    return StageError(stage, cause, remedy)


class _FileLock:
    """The lock in a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While nobody else judges or changes the lock; its file is made when it is missing."""
        while True:
            with open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
                # Some shared file systems know no such locks; two drivers that start at once are not told there.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                if self._path.exists() and self._path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    yield
                    return

    def holder(self) -> Holder | None:
        """Whom it names; `FileNotFoundError` where there is none."""
        return _parsed(self._path.read_bytes())

    def is_gone(self) -> bool:
        """Whether it was taken away: of a storage that is away the rest of the run is not to be seen either. Looked for
        last, since the storage may be back by now."""
        return self._path.with_name(RUN_ID).exists() and not self._path.exists()

    def take(self, me: Holder) -> None:
        with self._path.open("r+", encoding="utf-8") as file:
            file.truncate()
            file.write(me.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def beat(self, me: Holder) -> None:
        os.utime(self._path)

    def last_beat(self) -> float:
        return self._path.stat().st_mtime

    def now(self) -> float:
        """On the storage's clock."""
        probe = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        probe.write_text("now")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def give_up(self) -> None:
        self._path.unlink()


class _ObjectLock:
    """The lock in an object store: best effort, since nothing there is done by one process alone."""

    def __init__(self, there: Objects) -> None:
        self._there = there

    @contextmanager
    def alone(self) -> Iterator[None]:
        yield

    def holder(self) -> Holder | None:
        """Whom it names; `FileNotFoundError` where there is none."""
        return _parsed(self._there.read())

    def is_gone(self) -> bool:
        """Whether what is not there was taken away: a store that is away says so."""
        return True

    def take(self, me: Holder) -> None:
        self._there.write(me.model_dump_json().encode())

    def beat(self, me: Holder) -> None:
        self.take(me)

    def last_beat(self) -> float:
        return self._there.modified()

    def now(self) -> float:
        """On the store's clock."""
        probe = Objects(self._there.scheme, self._there.bucket, self._there.query, f"{self._there.key}.{os.getpid()}")
        probe.write(b"now")
        try:
            return probe.modified()
        finally:
            probe.delete()

    def give_up(self) -> None:
        self._there.delete()


def _lock_of(root: Path) -> _FileLock | _ObjectLock:
    there = objects_at(root / NAME)
    return _ObjectLock(there) if there else _FileLock(root / NAME)


def this_process() -> Holder:
    """What the lock says of this process."""
    try:
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        machine = socket.gethostname()
    return Holder(
        host=socket.gethostname(),
        machine=machine,
        pid=os.getpid(),
        started=_start_of(os.getpid()) or 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _parsed(text: bytes) -> Holder | None:
    try:
        return Holder.model_validate_json(text)
    except ValidationError:  # empty, or cut short by a power failure
        return None


def _taken(
    lock: _FileLock | _ObjectLock, me: Holder, tell: Callable[[str], None], limit_seconds: float
) -> tuple[Holder, float] | None:
    """Take the lock from nobody or from the dead; else who holds it, and when that process beat last."""
    with lock.alone():
        found = _last_sign(lock)
        if found:
            holder, beat = found
            why = _stale(holder, me, lambda: lock.now() - beat, limit_seconds)
            if why is None:
                return found
            tell(f"taking over from process {holder.pid} on {holder.host}: {why}")
        lock.take(me)
    return None


def _last_sign(lock: _FileLock | _ObjectLock) -> tuple[Holder, float] | None:
    """Who holds a lock, and when that process beat last; nobody where there is none, or it was given up just now."""
    try:
        holder = lock.holder()
        return (holder, lock.last_beat()) if holder else None
    except FileNotFoundError:
        return None


def _stale(holder: Holder, me: Holder, silent_seconds: Callable[[], float], limit_seconds: float) -> str | None:
    """Why a holder no longer works on the run; None while it does, or may."""
    if holder.machine == me.machine:
        return None if _start_of(holder.pid) == holder.started else "that process is dead"
    seconds = silent_seconds()
    return f"no sign of life for {seconds:.0f} s" if seconds > limit_seconds else None


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None for a dead one, 0 where the system does not tell."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return 0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _lost(lock: _FileLock | _ObjectLock, me: Holder) -> str | None:
    """Why a run that this process held is no longer its own; None while it is, or the storage is away."""
    try:
        holder = lock.holder()
    except FileNotFoundError:
        why = "the lock is gone: another driver took this run over and is done with it, or somebody deleted the lock"
        return why if lock.is_gone() else None
    if holder == me:
        return None
    return f"process {holder.pid} on {holder.host} took this run over" if holder else "the lock was emptied"


def _beat(
    lock: _FileLock | _ObjectLock, me: Holder, tell: Callable[[str], None], done: threading.Event, seconds: float
) -> None:
    while not done.wait(seconds):
        with contextlib.suppress(OSError, StorageError):  # the storage is away: the next beat may reach it
            if why := _lost(lock, me):
                tell(why)
                os.kill(os.getpid(), signal.SIGTERM)
                return  # Ray's handler ends the process a little later: until then, too, the lock is the other's
            lock.beat(me)
