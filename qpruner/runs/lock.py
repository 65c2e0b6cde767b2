"""The lock file of a run, which names its driver: the one process that works on the run.

The time of change of the file is the last heartbeat. A lock is stale if its driver is dead. On this
machine the process id tells; on another one a minute without a heartbeat does, measured here, since
clocks may differ.

`filelock` lets one process at a time judge a lock. At a URI this holds only among the processes of
one machine, because pyarrow (26) has no conditional put: of two drivers that take the lock at once,
the first heartbeat ends one.
"""

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from pydantic import ValidationError

from qpruner.errors import StageError, StorageError, UserError
from qpruner.runs.records import RUN_ID, Recorded
from qpruner.runs.storage import Storage, display_name, exclusive, retry_storage, storage_at

NAME = "driver.lock"
HEARTBEAT_SECONDS = 10.0
STALE_BEATS = 6  # missed heartbeats after which a driver on another machine counts as dead


class Holder(Recorded):
    """The contents of a lock file: the process that holds the lock of a run."""

    host: str
    # boot id and process namespace: processes with the same value see each other's process ids
    machine: str
    pid: int
    started: int  # start of the process in clock ticks since boot, because process ids are reused
    since: str


class Driver(NamedTuple):
    """The process that holds the lock of a run.

    The next command takes the lock unless this process is alive.
    """

    holder: Holder
    beat: float  # last heartbeat, in Unix seconds by the clock of the storage
    state: Literal["alive", "dead", "silent"]
    """`dead`: ended on this machine. `silent`: on another one, for a minute without a heartbeat."""


def driver_of(root: Path) -> Driver | None:
    """Find the driver of a run without writing anything; return None if nobody holds the lock."""
    path = root / NAME
    current = retry_storage(lambda: _read_lock(storage_at(path)), path)
    if current is None:
        return None
    holder, beat = current
    if holder.machine == this_process().machine:
        return Driver(holder, beat, "alive" if _is_alive(holder) else "dead")
    # By the clock of this machine: if that is a minute fast, a live driver looks silent.
    is_silent = time.time() - beat > STALE_BEATS * HEARTBEAT_SECONDS
    return Driver(holder, beat, "silent" if is_silent else "alive")


@contextmanager
def hold_run(
    root: Path, notify: Callable[[str], None], heartbeat_seconds: float = HEARTBEAT_SECONDS
) -> Iterator[Callable[[], bool]]:
    """Hold the lock of a run while the block runs.

    Yield a function that returns whether the lock is still held. If it is lost, the next heartbeat
    ends this process (SIGTERM).

    Raises:
        UserError: If another driver works on the run, or the file system has no file locks.
    """
    lock = storage_at(root / NAME)
    me = this_process()
    limit = STALE_BEATS * heartbeat_seconds
    deadline = time.monotonic() + limit
    watched = None  # another holder, with its last heartbeat, that may be dead

    def take() -> tuple[Holder, float] | None:
        is_silent = time.monotonic() > deadline
        try:
            return _take(lock, me, notify, earlier=watched if is_silent else None, seconds=limit)
        except OSError as error:
            if error.errno != errno.ENOLCK:
                raise
            raise UserError(
                f"`output`: file locks do not work on the file system of {root} "
                f"({error.strerror}); mount it with lock support, or name another `output`"
            ) from error

    # Tried once: a repetition would meet our own lock.
    while current := retry_storage(take, root / NAME, seconds=0.0):
        holder, _ = current
        who = f"process {holder.pid} on {holder.host}"
        if holder.machine == me.machine or (watched and current != watched):
            raise UserError(
                f"`output`: {display_name(root)} is being worked on by {who} since "
                f"{holder.since}; wait until it ends, or stop it"
            )
        if not watched:
            notify(
                f"waiting up to {limit:.0f} s for a sign of life of {who}, which has held this "
                f"run since {holder.since} and may be dead"
            )
            watched = current
        time.sleep(heartbeat_seconds / 4)

    done = threading.Event()
    heartbeat = threading.Thread(
        target=_beat, args=(lock, me, notify, done, heartbeat_seconds), daemon=True
    )
    heartbeat.start()

    def holds_run() -> bool:
        with contextlib.suppress(OSError, StorageError):
            return not _is_lost(lock, me)
        return True

    try:
        yield holds_run
    finally:
        done.set()
        heartbeat.join()
        with contextlib.suppress(OSError, StorageError), exclusive(lock.path):
            if _read_holder(lock) == me:
                lock.delete()


def lock_lost(stage: str, evidence: str) -> StageError:
    """Return the error for a stage during which another driver took the run over.

    That happens while this process is suspended.
    """
    return StageError(
        stage,
        f"another driver took this run over while this one gave no sign of life: {evidence}",
        "wait until the other driver ends (see `qpruner status`), then repeat the command",
    )


def this_process() -> Holder:
    """Describe this process as the holder of a lock."""
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        machine = host
    return Holder(
        host=host,
        machine=machine,
        pid=os.getpid(),
        started=_start_ticks(os.getpid()) or 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _read_holder(lock: Storage) -> Holder | None:
    """Read the holder from a lock file; return None if the file is damaged."""
    # The file may be empty, or cut short by a power failure.
    with contextlib.suppress(ValidationError):
        return Holder.model_validate_json(lock.read())
    return None


def _read_lock(lock: Storage) -> tuple[Holder, float] | None:
    """Read the holder of a lock and its last heartbeat; return None if nobody holds the lock."""
    with contextlib.suppress(FileNotFoundError):
        holder = _read_holder(lock)
        stat = lock.stat() if holder else None
        if holder and stat:
            return holder, stat.modified
    return None


def _take(
    lock: Storage,
    me: Holder,
    notify: Callable[[str], None],
    earlier: tuple[Holder, float] | None,
    seconds: float,
) -> tuple[Holder, float] | None:
    """Take the lock if it is free, stale, or still as it was `earlier`, `seconds` ago.

    Otherwise return its holder and last heartbeat.
    """
    with exclusive(lock.path):
        current = _read_lock(lock)
        if current:
            holder, _ = current
            if holder.machine == me.machine:
                is_alive = _is_alive(holder)
                why = "that process is dead"
            else:
                is_alive = current != earlier
                why = f"no sign of life for {seconds:.0f} s"
            if is_alive:
                return current
            notify(f"taking over from process {holder.pid} on {holder.host}: {why}")
        lock.write(me.model_dump_json().encode())
    return None


def _is_alive(holder: Holder) -> bool:
    return _start_ticks(holder.pid) == holder.started


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot.

    Return None if the process is dead, and 0 if the system has no /proc.
    """
    if not Path("/proc/self/stat").exists():
        return 0 if psutil.pid_exists(pid) else None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state = fields[0]
    is_dead = state in "ZX"
    return None if is_dead else int(fields[19])


def _is_lost(lock: Storage, me: Holder) -> bool:
    """Return True if this process no longer holds the lock.

    Return False if that is unknown, because the storage cannot be reached.
    """
    try:
        return _read_holder(lock) != me
    except FileNotFoundError:
        # If the storage is away, other files of the run are missing, too. The storage may come back
        # in between.
        run_id = storage_at(lock.path.with_name(RUN_ID))
        return run_id.stat() is not None and lock.stat() is None


def _beat(
    lock: Storage, me: Holder, notify: Callable[[str], None], done: threading.Event, seconds: float
) -> None:
    while not done.wait(seconds):
        with contextlib.suppress(OSError, StorageError):  # the next heartbeat may reach the storage
            if _is_lost(lock, me):
                notify(
                    "another driver took this run over, or somebody deleted its lock: "
                    "this process ends"
                )
                # To the main thread: a signal to the process may be delivered to this one, and
                # wakes nobody.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                # The process ends a little later, in Ray's handler. This thread must not renew the
                # lock until then.
                return
            lock.renew(me.model_dump_json().encode())
