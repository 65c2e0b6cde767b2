"""What grows while a process drives a run, its log and TensorBoard's files; libraries do not tear the terminal."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpruner.errors import QprunerError, StorageError, UserError, note_defect
from qpruner.runs.events import Event, StageFinished
from qpruner.runs.run_dir import LOG
from qpruner.runs.storage import display_name, fetch_file, files_in, remove, retry_storage, storage_at, storage_error

logger = logging.getLogger(__name__)
SECONDS_BETWEEN = 30.0


def quiet_libraries() -> None:
    """Keep progress bars and banners of the libraries off the terminal; their warnings go to the log."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft asks for it (0.21), and nobody who reads that can do anything about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    for name in ("httpx", "httpx2"):  # the hub's clients tell each address that they ask for: one signed is a key
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def logging_to(root: Path) -> Iterator[None]:
    """Log to a run's `qpruner.log` meanwhile, libraries' warnings and an unexpected error included.

    Raises:
        UserError: If the folder cannot be written.
    """
    log = root / LOG
    try:
        root.mkdir(parents=True, exist_ok=True)
        sent = retry_storage(storage_at(log).stat, log)
        # A driver at work here, or one that was killed, has written more than it sent: that stays.
        if sent and not (log.is_file() and log.stat().st_size >= sent.size):
            fetch_file(log, log)
        handler = logging.FileHandler(log)
    except OSError as error:
        if trouble := storage_error(error, root):
            raise trouble from error
        raise UserError(
            f"`output`: {root} cannot be written ({error.strerror}); name a folder that may be written"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    everything = logging.getLogger()
    level, told_warnings = everything.level, warnings.showwarning
    everything.addHandler(handler)
    everything.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except QprunerError as error:
        logger.error("%s", error)
        raise
    except Exception as error:
        note_defect(error, f"{display_name(root).rstrip('/')}/{LOG}, which has all of it")
        logger.exception("unexpected error")
        raise
    finally:
        # Whose process it is may be a notebook.
        if warnings.showwarning is not told_warnings:
            logging.captureWarnings(False)
        everything.setLevel(level)
        everything.removeHandler(handler)
        handler.close()


class Uploader:
    """Sends what changed of a folder and a file of a run at a URI: at intervals, after each stage, and at its close."""

    def __init__(self, root: Path, folder: str, file: str) -> None:
        self._folder, self._file = root / folder, root / file
        self._sent = dict[Path, tuple[int, int]]()
        self._is_needed = not storage_at(root).fills_this_disk
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
                if state and state != self._sent.get(path):
                    storage_at(path).put(path)
                    self._sent[path] = state
            if is_last and self._folder.is_dir():
                for path in (self._folder / name for name in files_in(self._folder)):
                    if path not in self._sent:
                        remove(path)
        except (OSError, StorageError) as error:  # it costs no result
            again = "by the next command" if is_last else f"in {SECONDS_BETWEEN:.0f} s"
            text = "TensorBoard's files and the log could not be sent: %s; that is tried again %s: check `output`"
            logger.warning(f"{text}, the network and credentials", error, again)
        self._due = time.monotonic() + SECONDS_BETWEEN
