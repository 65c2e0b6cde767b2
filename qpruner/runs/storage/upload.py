"""Uploads the files that grow on this machine and are no records, such as TensorBoard's and the log."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from qpruner.errors import StorageError
from qpruner.runs.events import Event, StageFinished
from qpruner.runs.storage import files_in, remove
from qpruner.runs.storage.objects import objects_at

logger = logging.getLogger(__name__)
SECONDS_BETWEEN = 30.0


class Uploader:
    """Sends the files that changed: at intervals, when a stage ends, and when it is closed.

    Args:
        root: The run; for one in a folder there is nothing to send.
        folder: Name of a folder in it that this process writes anew.
        file: Name of a further file.
    """

    def __init__(self, root: Path, folder: str, file: str) -> None:
        self._folder, self._file = root / folder, root / file
        self._sent = dict[Path, tuple[int, int]]()
        self._is_needed = objects_at(root) is not None
        if self._is_needed:  # what this machine has of the folder may be older than what another one sent
            shutil.rmtree(self._folder, ignore_errors=True)
        self._due = time.monotonic() + SECONDS_BETWEEN

    def listen(self, event: Event) -> None:
        """Send what changed, where it is time to."""
        if self._is_needed and (time.monotonic() >= self._due or isinstance(event, StageFinished)):
            self._send(is_last=False)

    def close(self) -> None:
        """Send the rest, and delete what an earlier command sent and this one did not write."""
        if self._is_needed:
            self._send(is_last=True)

    def _send(self, is_last: bool) -> None:
        try:
            for path in (*self._folder.rglob("*"), self._file):
                state = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
                if state and state != self._sent.get(path) and (there := objects_at(path)):
                    there.put(path)
                    self._sent[path] = state
            if is_last and self._folder.is_dir():
                for path in (self._folder / name for name in files_in(self._folder)):
                    if path not in self._sent:
                        remove(path)
        except (OSError, StorageError) as error:  # it costs no result
            logger.warning(
                "TensorBoard's files and the log could not be sent: %s; that is tried again %s: if it stays so, check "
                "that the address of `output` is reached from here and its credentials may write",
                error,
                "by the next command" if is_last else f"in {SECONDS_BETWEEN:.0f} s",
            )
        self._due = time.monotonic() + SECONDS_BETWEEN
