"""Files and folders of this machine: digests, copies, durable writes, and the lists that vouch for a folder's files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from qpruner.runs.records import Recorded

Item = TypeVar("Item")
Result = TypeVar("Result")

FILES = ".files.json"
"""Ending of a folder's list: `prune.files.json` beside `prune/`."""
PIECE_BYTES, HASHED_BYTES = 16 * 2**20, 2**20
"""Bytes read at once to copy, and to digest: many threads digest, in processes whose memory is measured."""
WAITING_SECONDS = 0.1
CONCURRENT = 16
"""Files that are read, sent or fetched at once."""
OnPiece = Callable[[], object]
"""Called after each piece that was read, from any thread, and while another process fetches the same."""


class FileList(Recorded):
    """The digests of a folder's files; a file that differs is damaged."""

    sha256: dict[str, str]


verified: dict[Path, FileList] = {}
"""Folders of this machine that this process wrote or compared, with their lists then."""


def list_path(folder: Path) -> Path:
    """Name the list of a folder."""
    return folder.with_name(folder.name + FILES)


def for_each(action: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function to several items at once; return the results in order."""
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(action, items))


def copy_pieces(
    read: Callable[[int], bytes],
    write: Callable[[bytes], object] = lambda piece: None,
    on_piece: OnPiece = lambda: None,
    piece_bytes: int | None = None,
) -> str:
    """Copy piece by piece; return the sha256."""
    digest = hashlib.sha256()
    while piece := read(piece_bytes or PIECE_BYTES):
        digest.update(piece)
        write(piece)
        on_piece()
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder and all below it durable."""
    for path in (folder, *folder.rglob("*")):
        sync(path)


def rename(path: Path, target: Path) -> None:
    """Rename a file or folder that exists.

    A network file system may rename and lose the answer. A repetition then finds nothing under the old name.
    """
    try:
        path.replace(target)
    except FileNotFoundError:
        target.stat()


def share_files(folder: Path) -> None:
    """Let whoever may read a folder read its files: safetensors writes files for their owner only."""
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readable)


def empty_folder(folder: Path) -> Path:
    """Make an empty folder on this machine in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def exclusive(path: Path, on_piece: OnPiece = lambda: None) -> Iterator[None]:
    """Hold a path for this process; `on_piece` is called while another process does: who waits does not hang."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    while not lock.is_locked:
        try:
            lock.acquire(timeout=WAITING_SECONDS, poll_interval=WAITING_SECONDS / 2)
        except Timeout:
            on_piece()
    try:
        yield
    finally:
        release(lock)


def release(lock: FileLock) -> None:
    """Delete a lock's file, then release it: filelock sees that the file it waited for is gone, and makes another."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


@contextmanager
def working_folder(prefix: str) -> Iterator[Path]:
    """Yield a folder for as long as this process needs it, and remove what killed processes left of the same prefix.

    The kernel releases the lock of a folder whatever ends its process, also between containers that share the folder of
    temporary files.
    """
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{prefix}*.lock"):
        with suppress(OSError):  # in use, or gone just now
            if left.lstat().st_uid == os.getuid():
                (lock := FileLock(left)).acquire(timeout=0)
                shutil.rmtree(left.with_suffix(""), ignore_errors=True)
                release(lock)
    folder = place / f"{prefix}{uuid.uuid4().hex}"
    lock = FileLock(folder.with_suffix(".lock"))
    lock.acquire()
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release(lock)
