"""One driver a run: a file that names the process that works on it, and whose time of change is its heartbeat.

A lock is stale when its process is dead, where this machine can see that. A driver on another machine is watched until
it beats again, or should have: machines' clocks need not agree. `filelock` keeps two processes from judging one lock at
once, of a run at a URI those of this machine (pyarrow 26 has no conditional put): of two drivers elsewhere that start
in the same instant the first heartbeat ends one.
"""

from __future__ import annotations

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
STALE_BEATS = 6
"""Without so many heartbeats, another machine's driver is taken for dead."""


class Holder(Recorded):
    """The process that works on a run."""

    host: str
    machine: str
    """Boot and process namespace: where these are equal, process numbers mean the same."""
    pid: int
    started: int
    """When the kernel started it, in clock ticks since boot: process numbers come again."""
    since: str


class Driver(NamedTuple):
    """The process that a run's lock names; the next command takes the run of one that is not alive."""

    holder: Holder
    beat: float
    """Its last heartbeat, in Unix seconds on the storage's clock."""
    state: Literal["alive", "dead", "silent"]
    """`dead` on this machine; `silent` on another, a minute without a heartbeat."""


def driver_of(root: Path) -> Driver | None:
    """Find who drives a run; None where nobody holds its lock. Nothing is written."""
    found = retry_storage(lambda: _last_beat(storage_at(root / NAME)), root / NAME)
    if found is None:
        return None
    holder, beat = found
    if holder.machine == this_process().machine:
        return Driver(holder, beat, "alive" if _is_alive(holder) else "dead")
    # By this machine's clock: one that is a minute ahead calls a driver silent that is not.
    return Driver(holder, beat, "silent" if time.time() - beat > STALE_BEATS * HEARTBEAT_SECONDS else "alive")


@contextmanager
def hold_run(
    root: Path, notify: Callable[[str], None], heartbeat_seconds: float = HEARTBEAT_SECONDS
) -> Iterator[Callable[[], bool]]:
    """Hold a run for this process; end the process (SIGTERM) when another took the run while this one was suspended.

    Yields a callable: True while this process holds the lock, or the storage cannot be reached. `notify` gets a line
    when another machine's driver is waited for, a stale lock is taken, or this one was lost.

    Raises:
        UserError: If another driver works on the run, with its host and process.
    """
    lock, me, limit = storage_at(root / NAME), this_process(), STALE_BEATS * heartbeat_seconds
    seen, deadline = None, time.monotonic() + limit

    def take() -> tuple[Holder, float] | None:
        try:
            return _take(lock, me, notify, seen if time.monotonic() > deadline else None, limit)
        except OSError as error:
            if error.errno != errno.ENOLCK:
                raise
            raise UserError(
                f"`output`: the locks of the file system of {root} fail ({error.strerror}); mount it with locks, or "
                "name another `output`"
            ) from error

    while found := retry_storage(take, root / NAME, seconds=0.0):  # once: an unanswered write would look like another's
        holder, _ = found
        if holder.machine == me.machine or (seen and found != seen):
            raise UserError(
                f"`output`: {display_name(root)} is being worked on by process {holder.pid} on {holder.host} since "
                f"{holder.since}; wait until it is done, stop it, or name another `output`"
            )
        if not seen:
            text = f"waiting up to {limit:.0f} s for a sign of life of process {holder.pid} on {holder.host}"
            notify(f"{text}, which holds this run since {holder.since} and may be dead")
            seen = found
        time.sleep(heartbeat_seconds / 4)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(lock, me, notify, done, heartbeat_seconds), daemon=True)
    beating.start()

    def holds_run() -> bool:
        with contextlib.suppress(OSError, StorageError):
            return _lost(lock, me) is None
        return True

    try:
        yield holds_run
    finally:
        done.set()
        beating.join()
        with contextlib.suppress(OSError, StorageError), exclusive(lock.path):
            if _holder(lock) == me:
                lock.delete()


def lock_lost(stage: str, how: str) -> StageError:
    """Explain why a stage ends whose driver slept while another worked on its run; `how` shows it."""
    return StageError(
        stage,
        f"another driver took this run over while this one gave no sign of life: {how}",
        "leave the run to it (`qpruner status` tells where it stands); once that has ended, the same command goes on "
        "from what is recorded",
    )


def this_process() -> Holder:
    """Describe this process."""
    try:
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        machine = socket.gethostname()
    started, since = _start_of(os.getpid()) or 0, time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return Holder(host=socket.gethostname(), machine=machine, pid=os.getpid(), started=started, since=since)


def _holder(lock: Storage) -> Holder | None:
    """Read whom a lock names; `FileNotFoundError` where there is none."""
    try:
        return Holder.model_validate_json(lock.read())
    except ValidationError:  # empty, or cut short by a power failure
        return None


def _last_beat(lock: Storage) -> tuple[Holder, float] | None:
    """Read who holds a lock, and its last heartbeat; None where nobody does."""
    try:
        holder, found = _holder(lock), lock.stat()
    except FileNotFoundError:
        return None
    return (holder, found.modified) if holder and found else None


def _take(
    lock: Storage, me: Holder, notify: Callable[[str], None], silent: tuple[Holder, float] | None, limit: float
) -> tuple[Holder, float] | None:
    """Take the lock from nobody, the dead or the `silent`; return who else holds it, and its last heartbeat."""
    with exclusive(lock.path):
        if found := _last_beat(lock):
            holder, _ = found
            is_here = holder.machine == me.machine
            if (is_here and _is_alive(holder)) or (not is_here and found != silent):
                return found
            why = "that process is dead" if is_here else f"no sign of life for {limit:.0f} s"
            notify(f"taking over from process {holder.pid} on {holder.host}: {why}")
        lock.write(me.model_dump_json().encode())
    return None


def _is_alive(holder: Holder) -> bool:
    return _start_of(holder.pid) == holder.started


def _start_of(pid: int) -> int | None:
    """Tell when a process started, in clock ticks since boot; None for a dead one, 0 where the system does not tell."""
    if not Path("/proc/self/stat").exists():
        return 0 if psutil.pid_exists(pid) else None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _lost(lock: Storage, me: Holder) -> str | None:
    """Tell why this process no longer holds a run; None while it does, or the storage is away."""
    try:
        holder = _holder(lock)
    except FileNotFoundError:
        # Of a storage that is away the run's other files are missing, too; the lock is looked for again after them.
        if not storage_at(lock.path.with_name(RUN_ID)).stat() or lock.stat():
            return None
        return "the lock is gone: another driver took this run over and is done with it, or somebody deleted the lock"
    if holder == me:
        return None
    return f"process {holder.pid} on {holder.host} took this run over" if holder else "the lock was emptied"


def _beat(lock: Storage, me: Holder, notify: Callable[[str], None], done: threading.Event, seconds: float) -> None:
    while not done.wait(seconds):
        with contextlib.suppress(OSError, StorageError):  # the storage is away: the next beat may reach it
            if why := _lost(lock, me):
                notify(why)
                os.kill(os.getpid(), signal.SIGTERM)
                return  # Ray's handler ends the process a little later; until then the lock stays the other's
            lock.renew(me.model_dump_json().encode())
