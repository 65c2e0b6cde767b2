"""Halts a search: running rungs finish, nothing new starts, and the records say where to resume."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray.tune.callback import Callback
from ray.tune.experiment import Trial
from ray.tune.stopper import Stopper

from qpruner.cluster.tune.job import LivesInDriver
from qpruner.errors import NodeDiffers, QprunerError
from qpruner.runs.events import Emit, Message
from qpruner.wording import counted


class Halt(LivesInDriver, Stopper, Callback):  # type: ignore[misc]
    """Ends Tune's session between rungs, on Ctrl-C or on request; a second Ctrl-C raises KeyboardInterrupt at once.

    Attributes:
        requested: Whether the search is to end.
        interrupted: Whether a person asked for it.
        trouble: The error that the search ends with; None if it may be resumed.
    """

    def __init__(self, emit: Emit) -> None:
        self.requested = self.interrupted = False
        self.trouble: QprunerError | None = None
        self._emit, self._announced, self._num_running, self._at_once = emit, False, 0, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C inside; signals reach the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether a trial that reported a rung is to stop there."""
        return self.requested

    def on_error_text(self, error: str) -> None:
        """End the search if a trial's error is of a node that cannot be used: the next trials would fail there too."""
        found = re.search(rf"^RuntimeError: {NodeDiffers.__name__}: (.+)$", error, re.MULTILINE)
        if found and self.trouble is None:
            self.end(NodeDiffers(found[1]))
            self._emit(Message("search", f"warning: {found[1]}; running rungs finish, nothing new starts"))

    def end(self, trouble: QprunerError, at_once: bool = False) -> None:
        """End the search with an error, the first there is: between rungs, or at Tune's next step.

        Raised while Tune handles a result, it would come out as a TuneError, after Tune had told the searcher a second
        time that its trial is over (Ray 2.60).
        """
        self.requested, self.trouble = True, self.trouble or trouble
        self._at_once = self._at_once or at_once

    def stop_all(self) -> bool:
        """Return whether no trial is running; those that wait for a slot are not started any more."""
        return self.requested and not self._num_running

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raise the error that ends the search at once; announce an interruption."""
        if self.trouble and self._at_once:
            raise self.trouble
        self._num_running = sum(1 for trial in trials if trial.status == Trial.RUNNING)
        if self.interrupted and not self._announced:
            # Not in the signal's handler, which may come in the middle of a line.
            self._announced = True
            awaited = counted(self._num_running, "running rung")
            text = f"interrupted: waiting for {awaited} to finish; Ctrl-C again leaves at once"
            self._emit(Message("search", text))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.requested = self.interrupted = True
