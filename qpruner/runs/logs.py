"""What a process that drives a run does first: its log goes to the run, and libraries do not tear the terminal."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpruner.errors import QprunerError, UserError, note_defect
from qpruner.runs.run_dir import LOG
from qpruner.runs.storage import display_name, fetch_file, retry_storage, storage_at, storage_error

logger = logging.getLogger(__name__)


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

    Args:
        root: The run folder, made if it is not there; or the mirror of a URI.

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
        logger.debug("failed", exc_info=True)
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
