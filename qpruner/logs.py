"""What a process that drives a run does first: its log goes to the run, and libraries do not tear the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpruner.errors import QprunerError, UserError, note_defect
from qpruner.objects import is_mirror, name_of
from qpruner.patience import storage_error
from qpruner.rundir import LOG, fetch_file

logger = logging.getLogger(__name__)


def quiet_libraries() -> None:
    """Progress bars and banners of the libraries would tear the terminal's own; their warnings go to the log."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def logging_to(root: Path) -> Iterator[None]:
    """Log to a run's `qpruner.log` meanwhile, libraries' warnings and an unexpected error included.

    Args:
        root: The run folder, made if it is not there; or the mirror of a URI.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        if is_mirror(root):
            with contextlib.suppress(FileNotFoundError):  # what other machines said goes on here
                fetch_file(root / LOG, root / LOG)
        handler = logging.FileHandler(root / LOG)
    except OSError as error:
        trouble = storage_error(error, root)
        if trouble:
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
        note_defect(error, f"{name_of(root).rstrip('/')}/{LOG}, which has all of it")
        logger.exception("unexpected error")
        raise
    finally:
        # Whose process it is may be a notebook.
        if warnings.showwarning is not told_warnings:
            logging.captureWarnings(False)
        everything.setLevel(level)
        everything.removeHandler(handler)
        handler.close()
