"""Repeat what fails because a disk is full or a storage is away; give up with an error that says how to go on."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from qpruner.errors import StorageError

Result = TypeVar("Result")

PATIENCE_SECONDS = float(os.environ.get("QPRUNER_STORAGE_PATIENCE_SECONDS", "120"))
PAUSES = wait_exponential(multiplier=0.5, max=20.0)

FULL = (errno.ENOSPC, errno.EDQUOT)
AWAY = (
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
)
ON_DISK = (*FULL, errno.EIO, errno.EROFS, errno.ESTALE)
"""Numbers in the texts of libraries that are not Python; other numbers there may speak of a hub."""
TORCH_CANNOT_WRITE = "inline_container.cc"
"""torch.save names only the place in its own code where a write came out short, as on a full disk (2.13)."""

logger = logging.getLogger(__name__)


def retry_storage(
    operation: Callable[[], Result],
    path: Path,
    seconds: float | None = None,
    was_there: bool = False,
    resumable: bool = False,
) -> Result:
    """Run an operation on the run's storage; repeat it, with growing pauses, while that is full or away.

    Args:
        operation: What may be repeated after it failed half way.
        path: What to name where an error names no file.
        seconds: Pauses in all, `PATIENCE_SECONDS` by default.
        was_there: Whether a missing file means a storage that is away.
        resumable: Whether pauses are counted anew after long attempts, since the next continues where one ended.

    Raises:
        StorageError: When the storage is still full or away after that.
        FileNotFoundError: When what was there is still missing after that.
    """
    limit = PATIENCE_SECONDS if seconds is None else seconds

    def is_over(state: RetryCallState) -> bool:
        if resumable and time.monotonic() - state.start_time - state.idle_for > limit:
            state.start_time, state.idle_for = time.monotonic(), 0.0
        return state.idle_for >= limit

    def log(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        trouble = storage_error(error, path) if error else None
        logger.warning("%s; trying again in %.1f s", trouble.cause if trouble else error, state.upcoming_sleep)

    def is_away(error: BaseException) -> bool:
        return storage_error(error, path) is not None or (was_there and isinstance(error, FileNotFoundError))

    try:
        retrying = Retrying(
            retry=retry_if_exception(is_away), stop=is_over, wait=PAUSES, before_sleep=log, reraise=True
        )
        return retrying(operation)
    except Exception as error:
        if trouble := storage_error(error, path):
            raise trouble from error
        raise


def storage_error(error: BaseException, path: Path | None = None) -> StorageError | None:
    """Explain an error of a storage that is full or away, with `path` where it names no file; None for any other."""
    number, place = _number_of(error), getattr(error, "filename", None) or path
    if number in FULL:
        return StorageError(f"no space left for {place or 'the disk'}", "make room, then repeat the command")
    if number in AWAY:
        reason = getattr(error, "strerror", None) or os.strerror(number)
        cause = f"{place or 'the storage'} cannot be reached ({reason})"
        return StorageError(cause, "bring the storage back, then repeat the command")
    return None


def _number_of(error: BaseException) -> int:
    """Find the system's number of an error; 0 where it has none that speaks of storage."""
    text = str(error)
    if isinstance(error, OSError):
        found = re.search(r"\[[Ee]rrno (\d+)\]", text)  # shutil and pyarrow put it into the text only
        return error.errno or (int(found[1]) if found else 0)
    if TORCH_CANNOT_WRITE in text:
        return errno.ENOSPC
    found = re.search(r"\(os error (\d+)\)", text)  # safetensors, tokenizers
    number = int(found[1]) if found else 0
    return number if number in ON_DISK else 0
