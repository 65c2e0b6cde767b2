"""Whether the latest command on a run still works on it, by what it said and what the run's lock tells."""

from __future__ import annotations

import time
from dataclasses import dataclass

from qpruner.runs.lock import Driver, Holder, driver_of
from qpruner.runs.records import RunState
from qpruner.runs.run_dir import RunDir

RUNNING = "running"
CUT_OFF = "cut off"
"""Of a command whose process is gone without a word."""
GONE = "most likely gone"
"""Of one whose process, on another machine, gives no sign of life any more."""
MOMENT_SECONDS = 0.3
"""A driver that takes a run, or ends, has said so after less."""


@dataclass(frozen=True)
class Liveness:
    """The latest command on a run, and who drives the run.

    Attributes:
        state: What the command said of itself.
        driver: The process that the run's lock names; None where nobody holds it.
    """

    state: RunState
    driver: Driver | None

    @property
    def outcome(self) -> str:
        """How the command ended, or `running`; `cut off` or `most likely gone` where it could not say."""
        if self.state.outcome != RUNNING:
            return self.state.outcome
        if self.driver is None or not self._is_of_driver:
            return CUT_OFF
        return {"alive": RUNNING, "dead": CUT_OFF, "silent": GONE}[self.driver.state]

    @property
    def successor(self) -> Holder | None:
        """A living driver that took the run up after the command, and has begun no stage yet."""
        if self.driver and self.driver.state == "alive" and not self._is_of_driver:
            return self.driver.holder
        return None

    @property
    def last_sign(self) -> float:
        """When the driver, or the command where nobody drives the run, was last heard of, in Unix seconds."""
        return self.driver.beat if self.driver else self.state.updated

    @property
    def _is_of_driver(self) -> bool:
        """Whether the command is that of the process which the lock names."""
        told = (self.state.host, self.state.pid)
        return self.driver is not None and told == (self.driver.holder.host, self.driver.holder.pid)


def read_liveness(run: RunDir) -> Liveness | None:
    """Look who works on a run, and leave no trace; None before the first command.

    A driver writes its state before it gives the lock back, so who looks in between sees neither of them: a command
    that seems cut off is looked at twice.

    Raises:
        CorruptFile: If the state cannot be read.
    """
    life = _look(run)
    if life and life.outcome == CUT_OFF:
        time.sleep(MOMENT_SECONDS)
        life = _look(run)
    return life


def driver_text(run: RunDir) -> str | None:
    """Which living process works on a run; None where none does."""
    driver = driver_of(run.root)
    if driver is None or driver.state != "alive":
        return None
    return f"process {driver.holder.pid} on {driver.holder.host} works on {run.place}"


def warning_of_driver(run: RunDir) -> str | None:
    """What they are told who read a run's models while a command works on it; None where none does."""
    works = driver_text(run)
    return works and f"warning: {works}, whose models may be replaced meanwhile"


def _look(run: RunDir) -> Liveness | None:
    state = run.read_state(RunState)
    return Liveness(state, driver_of(run.root)) if state else None
