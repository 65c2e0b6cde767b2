"""Tells whether the latest command on a run still works on it, by what it reported and by the run's lock."""

from __future__ import annotations

import time
from dataclasses import dataclass

from qpruner.runs.lock import Driver, Holder, driver_of
from qpruner.runs.records import RunState
from qpruner.runs.run_dir import RunDir

RUNNING = "running"
CUT_OFF = "cut off"
"""Of a command whose process ended without reporting how."""
GONE = "most likely gone"
"""Of one whose process, on another machine, gives no sign of life any more."""
MOMENT_SECONDS = 0.3
"""A driver that takes the lock, or gives it back, has written its state after less."""


@dataclass(frozen=True)
class Liveness:
    """The state of the latest command on a run, and the process that the run's lock names, if any."""

    state: RunState
    driver: Driver | None

    @property
    def outcome(self) -> str:
        """How the command ended, or `running`; `cut off` or `most likely gone` where it could not report."""
        if self.state.outcome != RUNNING:
            return self.state.outcome
        if self.driver is None or not self._is_of_driver:
            return CUT_OFF
        return {"alive": RUNNING, "dead": CUT_OFF, "silent": GONE}[self.driver.state]

    @property
    def successor(self) -> Holder | None:
        """A living process that holds the lock since, and has begun no stage yet."""
        if self.driver and self.driver.state == "alive" and not self._is_of_driver:
            return self.driver.holder
        return None

    @property
    def last_sign(self) -> float:
        """The last sign of life of the driver, or of the command where nobody holds the lock, in Unix seconds."""
        return self.driver.beat if self.driver else self.state.updated

    @property
    def _is_of_driver(self) -> bool:
        process = (self.state.host, self.state.pid)
        return self.driver is not None and process == (self.driver.holder.host, self.driver.holder.pid)


def read_liveness(run: RunDir) -> Liveness | None:
    """Read state and lock of a run without leaving a trace; None before the first command.

    A driver writes its state before it gives the lock back, so a reader in between sees neither: a command that
    seems cut off is read twice.

    Raises:
        CorruptFile: If the state cannot be read.
    """
    found = _read(run)
    if found and found.outcome == CUT_OFF:
        time.sleep(MOMENT_SECONDS)
        found = _read(run)
    return found


def driver_text(run: RunDir) -> str | None:
    """Name the living process that works on a run; None where none does."""
    driver = driver_of(run.root)
    if driver is None or driver.state != "alive":
        return None
    return f"process {driver.holder.pid} on {driver.holder.host} works on {run.place}"


def warning_of_driver(run: RunDir) -> str | None:
    """Warn who reads a run's models while a command works on it; None where none does."""
    works = driver_text(run)
    return works and f"warning: {works}, whose models may be replaced meanwhile"


def _read(run: RunDir) -> Liveness | None:
    state = run.read_state(RunState)
    return Liveness(state, driver_of(run.root)) if state else None
