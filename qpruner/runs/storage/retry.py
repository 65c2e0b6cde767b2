"""Retries operations while a storage is full or away, then raises an error with the remedy."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qpruner.errors import StorageError

Result = TypeVar("Result")

PATIENCE_SECONDS = float(os.environ.get("QPRUNER_STORAGE_PATIENCE_SECONDS", "120"))
FIRST_PAUSE = 0.5  # seconds; each further one is twice as long
LONGEST_PAUSE = 20.0

FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_AWAY = (errno.EIO, errno.EROFS, errno.ESTALE)
HOST_AWAY = (errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)
AWAY = (*DISK_AWAY, *HOST_AWAY, errno.ECONNREFUSED, errno.ECONNRESET)
TORCH_CANNOT_WRITE = "inline_container.cc"
"""Part of the error of torch.save (2.13) on a full disk.

The error names only the C++ file that noticed it.
"""

logger = logging.getLogger(__name__)


def retry_storage(
    operation: Callable[[], Result],
    path: Path,
    seconds: float | None = None,
    was_there: bool = False,
    resumable: bool = False,
) -> Result:
    """Run an operation; repeat it with growing pauses while the storage is full or away.

    Args:
        operation: The operation.
        path: The storage for errors that name no file.
        seconds: The time of all pauses together; by default `PATIENCE_SECONDS`.
        was_there: Whether a missing file, too, means that the storage is away.
        resumable: Whether the pauses start again after an attempt that took longer than `seconds`.

    Raises:
        StorageError: If the storage is still full or away after that time.
    """
    limit = PATIENCE_SECONDS if seconds is None else seconds
    pause = FIRST_PAUSE
    waited = 0.0
    while True:
        started = time.monotonic()
        try:
            return operation()
        except Exception as error:
            trouble = storage_error(error, path)
            if not trouble and not (was_there and isinstance(error, FileNotFoundError)):
                raise
            if resumable and time.monotonic() - started > limit:
                waited = 0.0
            if waited >= limit:
                if trouble:
                    raise trouble from error
                raise
            cause = trouble.cause if trouble else error
            logger.warning("%s; trying again in %.1f s", cause, pause)
        time.sleep(pause)
        waited += pause
        pause = min(2 * pause, LONGEST_PAUSE)


def storage_error(error: BaseException, path: Path | None = None) -> StorageError | None:
    """Return the `StorageError` for an error of a storage that is full or away.

    Return None for any other error.
    """
    number = _number_of(error)
    place = getattr(error, "filename", None) or path
    if number in FULL:
        return StorageError(
            f"no space left for {place or 'the disk'}", "make room, then repeat the command"
        )
    if number in AWAY:
        reason = getattr(error, "strerror", None) or os.strerror(number)
        cause = f"{place or 'the storage'} cannot be reached ({reason})"
        return StorageError(cause, "bring the storage back, then repeat the command")
    return None


def _number_of(error: BaseException) -> int:
    """Find the errno of an error.

    Return 0 if it has none, or one that may also come from a model hub.
    """
    text = str(error)
    if isinstance(error, OSError):
        # Shutil and pyarrow have the number only in the text.
        return error.errno or _number_in(text, r"\[[Ee]rrno (\d+)\]")
    if TORCH_CANNOT_WRITE in text:
        return errno.ENOSPC
    number = _number_in(text, r"\(os error (\d+)\)")  # safetensors, tokenizers
    if number not in (*FULL, *DISK_AWAY):
        return 0  # other numbers may concern a model hub
    return number


def _number_in(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
