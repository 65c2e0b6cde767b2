"""Writes and uploads the log of a run and its TensorBoard files, and keeps libraries quiet."""

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
from qpruner.runs.storage import (
    display_name,
    fetch_file,
    files_in,
    remove,
    retry_storage,
    storage_at,
    storage_error,
)

logger = logging.getLogger(__name__)
SECONDS_BETWEEN = 30.0


def quiet_libraries() -> None:
    """Turn off the progress bars and banners of libraries; their warnings go to the log."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # From peft (0.21); users can do nothing about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    for name in ("httpx", "httpx2"):  # they log every URL, and a signed URL is a secret
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def logging_to(root: Path) -> Iterator[None]:
    """Log to the `qpruner.log` of a run while the block runs.

    The log also has the warnings of libraries and unexpected errors.
    """
    log = root / LOG
    try:
        root.mkdir(parents=True, exist_ok=True)
        uploaded = retry_storage(storage_at(log).stat, log)
        own_size = log.stat().st_size if log.is_file() else -1
        # A longer log on this machine stays: its driver is still running, or was killed before it
        # uploaded the rest.
        if uploaded and own_size < uploaded.size:
            fetch_file(log, log)
        handler = logging.FileHandler(log, encoding="utf-8")
    except OSError as error:
        trouble = storage_error(error, root)
        if trouble:
            raise trouble from error
        raise UserError(
            f"`output`: {root} cannot be written ({error.strerror}); name another folder"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root_logger = logging.getLogger()
    level = root_logger.level
    showwarning = warnings.showwarning
    root_logger.addHandler(handler)
    root_logger.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except QprunerError as error:
        logger.error("%s", error)
        raise
    except Exception as error:
        note_defect(error, f"{display_name(root).rstrip('/')}/{LOG}, which has the traceback")
        logger.exception("unexpected error")
        raise
    finally:
        # The process may be a notebook that goes on.
        if warnings.showwarning is not showwarning:
            logging.captureWarnings(False)
        root_logger.setLevel(level)
        root_logger.removeHandler(handler)
        handler.close()


class Uploader:
    """Uploads the log and the TensorBoard files of a run at a URI while a command works on it.

    Only files that have changed are uploaded: the log (`file`), and all in `folder`.
    """

    def __init__(self, root: Path, folder: str, file: str) -> None:
        self._folder = root / folder
        self._file = root / file
        self._uploaded: dict[Path, tuple[int, int]] = {}  # size and time of change, in ns
        self._is_needed = not storage_at(root).fills_this_disk
        if self._is_needed:  # files here may be older than those that another machine uploaded
            shutil.rmtree(self._folder, ignore_errors=True)
        self._due = time.monotonic() + SECONDS_BETWEEN

    def listen(self, event: Event) -> None:
        """Upload the changed files every half minute, and after each stage."""
        is_due = time.monotonic() >= self._due or isinstance(event, StageFinished)
        if self._is_needed and is_due:
            self._upload(is_last=False)

    def close(self) -> None:
        """Upload the remaining changes, and delete what earlier commands left at the URI.

        Deleted are TensorBoard files that are outdated.
        """
        if self._is_needed:
            self._upload(is_last=True)

    def _upload(self, is_last: bool) -> None:
        try:
            for path in (*self._folder.rglob("*"), self._file):
                if not path.is_file():
                    continue
                stat = path.stat()
                state = (stat.st_size, stat.st_mtime_ns)
                if state != self._uploaded.get(path):
                    storage_at(path).put(path)
                    self._uploaded[path] = state
            if is_last and self._folder.is_dir():
                stored = {self._folder / name for name in files_in(self._folder)}
                for path in stored - self._uploaded.keys():
                    remove(path)
        except (OSError, StorageError) as error:  # no result depends on these files
            logger.warning(
                "TensorBoard files and log could not be uploaded, which is tried again: %s", error
            )
        self._due = time.monotonic() + SECONDS_BETWEEN
