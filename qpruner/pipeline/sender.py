"""Sends to the run's URI what grows on this machine and is no record: TensorBoard's files and the log."""

from __future__ import annotations

import logging
import os
import shutil
import time

from qpruner.errors import StorageError
from qpruner.report.tensorboard import FOLDER
from qpruner.runs.events import Event, StageFinished
from qpruner.runs.paths import LOG, RunDir, files_in, remove, send_file

logger = logging.getLogger(__name__)
SECONDS_BETWEEN = 30.0


class Sender:
    """Sends what changed: at intervals, when a stage ends, and when it is closed.

    Args:
        run: The run; for one in a folder there is nothing to do.
    """

    def __init__(self, run: RunDir) -> None:
        self._run, self._sent = run, dict[str, tuple[int, int]]()
        if run.is_at_uri:
            # Made anew from the records: what this machine has may be older than what another one sent.
            shutil.rmtree(run.root / FOLDER, ignore_errors=True)
        self._due = time.monotonic() + SECONDS_BETWEEN

    def listen(self, event: Event) -> None:
        """Take one event in."""
        if time.monotonic() >= self._due or isinstance(event, StageFinished):
            self._send(is_last=False)

    def close(self) -> None:
        """Send the last of it, and drop what an earlier command sent and is no more."""
        self._send(is_last=True)

    def _send(self, is_last: bool) -> None:
        """A storage that is away stops no search: what could not be sent is sent later."""
        if not self._run.is_at_uri:
            return
        try:
            for name, state in self._files().items():
                if self._sent.get(name) != state:
                    send_file(self._run.root / name)
                    self._sent[name] = state
            events = self._run.root / FOLDER
            for name in files_in(events) if is_last and events.is_dir() else ():
                if f"{FOLDER}/{name}" not in self._sent:
                    remove(events / name)
        except (OSError, StorageError) as error:
            logger.warning(
                "TensorBoard's files and the log could not be sent: %s; that is tried again %s, and costs no result: "
                "if it stays so, see that the address of `output` is reached from here and its credentials may write",
                error,
                "by the next command" if is_last else f"in {SECONDS_BETWEEN:.0f} s",
            )
        self._due = time.monotonic() + SECONDS_BETWEEN

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of what there is on this machine."""
        root = self._run.root
        paths = [path for path in (*(root / FOLDER).rglob("*"), root / LOG) if path.is_file()]
        return {os.fspath(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
