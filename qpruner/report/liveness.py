"""Decides whether a run's latest command is still running, from the run's state file and its lock."""

from __future__ import annotations

import time
from dataclasses import dataclass

from qpruner.runs.lock import Driver, Holder, driver_of
from qpruner.runs.records import RunState
from qpruner.runs.run_dir import RunDir

RUNNING = "running"
CUT_OFF = "cut off"
"""Outcome of a command whose process ended without recording its outcome."""
GONE = "most likely gone"
"""Outcome of a command on another machine whose heartbeat has stopped."""
MOMENT_SECONDS = 0.3
"""Longest expected time between a driver's change of the run's state and its change of the lock."""


@dataclass(frozen=True)
class Liveness:
    """The state of a run's latest command and, if the run is locked, the process that holds the lock."""

    state: RunState
    driver: Driver | None

    @property
    def outcome(self) -> str:
        """The recorded outcome of the command, or else `running`, `cut off` or `most likely gone`."""
        if self.state.outcome != RUNNING:
            return self.state.outcome
        if self.driver is None or not self._is_of_driver:
            return CUT_OFF
        return {"alive": RUNNING, "dead": CUT_OFF, "silent": GONE}[self.driver.state]

    @property
    def successor(self) -> Holder | None:
        """The process of a newer command that holds the lock but has not begun a stage, if any."""
        if self.driver and self.driver.state == "alive" and not self._is_of_driver:
            return self.driver.holder
        return None

    @property
    def last_sign(self) -> float:
        """Time of the driver's last heartbeat or, without a lock, of the last state update, in Unix seconds."""
        return self.driver.beat if self.driver else self.state.updated

    @property
    def _is_of_driver(self) -> bool:
        process = (self.state.host, self.state.pid)
        return self.driver is not None and process == (self.driver.holder.host, self.driver.holder.pid)


def read_liveness(run: RunDir) -> Liveness | None:
    """Read a run's state and lock without writing anything; None before the first command.

    The state is read before the lock, so a command that ends between the two reads looks cut off. If a command looks
    cut off, both are therefore read again.

    Raises:
        CorruptFile: If the state cannot be read.
    """
    found = _read(run)
    if found and found.outcome == CUT_OFF:
        time.sleep(MOMENT_SECONDS)
        found = _read(run)
    return found


def driver_text(run: RunDir) -> str | None:
    """Name the living process that works on a run; None if there is none."""
    driver = driver_of(run.root)
    if driver is None or driver.state != "alive":
        return None
    return f"process {driver.holder.pid} on {driver.holder.host} works on {run.place}"


def warning_of_driver(run: RunDir) -> str | None:
    """Return a warning that a running command may replace the run's models; None if no command is running."""
    driver = driver_text(run)
    return driver and f"warning: {driver} and may replace its models meanwhile"


def _read(run: RunDir) -> Liveness | None:
    state = run.read_state(RunState)
    return Liveness(state, driver_of(run.root)) if state else None
