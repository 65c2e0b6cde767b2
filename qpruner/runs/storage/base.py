"""The interface of a run's storage, as it is in a folder, and the lists that vouch for a folder's files.

`objects.py` has the same for an object store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from qpruner.errors import CorruptFile
from qpruner.runs.records import Recorded
from qpruner.runs.storage.retry import FULL, Result, retry_storage

Item = TypeVar("Item")

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
    for left in place.glob(f".{prefix}*.lock"):
        with contextlib.suppress(OSError):  # in use, or gone just now
            if left.lstat().st_uid == os.getuid():
                (lock := FileLock(left)).acquire(timeout=0)
                shutil.rmtree(place / left.name[1:].removesuffix(".lock"), ignore_errors=True)
                release(lock)
    folder = place / f"{prefix}{uuid.uuid4().hex}"
    with exclusive(folder):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Stat(NamedTuple):
    """A file's time of change, in seconds on the storage's clock, and its bytes."""

    modified: float
    size: int


class Storage:
    """A file or folder of a run, bound to its path on this machine; here on a disk that may be shared with others.

    What concerns one file raises `FileNotFoundError` where it is not there, and an `OSError` where the storage is full
    or away, which the functions of `qpruner.runs.storage` repeat; what concerns folders and lists repeats it itself.
    """

    fills_this_disk = True
    """Whether what is written takes room on a disk of this machine; otherwise any machine can resume the run."""
    access_remedy = "`output` must lie in a folder that every node reads and writes"

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Storage:
        return Storage(self.path / name)

    @property
    def name(self) -> str:
        """The path or URI as a person knows it."""
        return str(self.path)

    @property
    def address(self) -> str:
        """What a command on another machine takes: a URI with its options."""
        return self.name

    @property
    def staging(self) -> Path:
        """Where a process of this machine writes what belongs here: the path itself, or a folder to send from."""
        return self.path

    # ---- one file

    def open(self) -> AbstractContextManager[Any]:
        """Open the file to read piece by piece."""
        return self.path.open("rb")

    def read(self) -> bytes:
        """Read the file as one writer wrote it."""
        return self.path.read_bytes()

    def digest(self, on_piece: OnPiece = lambda: None) -> str:
        """Digest the file as the storage has it."""
        piece_bytes = HASHED_BYTES if self.fills_this_disk else PIECE_BYTES
        with self.open() as stream:
            return copy_pieces(stream.read, on_piece=on_piece, piece_bytes=piece_bytes)

    def download(self, target: Path, on_piece: OnPiece = lambda: None) -> str:
        """Copy the file to one of this machine; return its sha256."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.open() as stream, target.open("wb") as file:
                return copy_pieces(stream.read, file.write, on_piece)
        except OSError as error:
            if error.errno in FULL:  # Python's own do not say which disk is full
                error.filename = str(target)
            raise

    def put(self, file: Path) -> str:
        """Copy a file of this machine here, if it is not this one; return its sha256."""
        return self.digest() if file == self.path else Storage(file).download(self.path)

    def write(self, data: bytes, durable: bool = True) -> None:
        """Write the file; a reader sees the old contents or the new, also after a crash if it is durable."""
        if not durable:
            new = self.path.with_suffix(".new")
            new.write_bytes(data)
            new.replace(self.path)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        new.write_bytes(data)
        sync(new)
        rename(new, self.path)
        sync(self.path.parent)

    def renew(self, data: bytes) -> None:
        """Set the file's time of change to now, where its contents are these."""
        os.utime(self.path)

    def stat(self) -> Stat | None:
        """Look at the file; None where there is no file of this very name."""
        # `Path.is_file` is False for a storage that is away, from Python 3.14 on.
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stat(found.st_mtime, found.st_size) if stat.S_ISREG(found.st_mode) else None

    # ---- folders

    def names(self) -> list[str]:
        """Name what lies directly in the folder, sorted; nothing where there is no folder."""
        return sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []

    def files(self) -> dict[str, int]:
        """Map every file in the folder and below to its bytes."""
        paths = [path for path in self.path.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.path)): path.stat().st_size for path in paths}

    def digests(self) -> dict[str, str]:
        """Digest every file in the folder and below."""
        names = sorted(retry_storage(self.files, self.path))
        found = for_each(lambda name: retry_storage((self / name).digest, self.path / name), names)
        return dict(zip(names, found, strict=True))

    def delete(self) -> None:
        """Delete the file or folder; half a folder is never taken for a complete one."""
        if not self.path.is_dir():
            self.path.unlink(missing_ok=True)
            return
        list_path(self.path).unlink(missing_ok=True)
        doomed = self.path.with_name(f".{self.path.name}.doomed")
        shutil.rmtree(doomed, ignore_errors=True)
        self.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def move(self, target: Path) -> None:
        """Move the file or folder, with its list, to another path of the run."""
        target.parent.mkdir(parents=True, exist_ok=True)
        rename(self.path, target)  # first: a folder without its list is read as it is
        with contextlib.suppress(FileNotFoundError):
            list_path(self.path).rename(list_path(target))

    def put_folder(self, folder: Path) -> FileList:
        """Copy a folder of this machine here, its list last, durably; it may lie here already."""
        if folder != self.path:
            shutil.copytree(folder, self.path, dirs_exist_ok=True)
        share_files(self.path)
        listed = FileList(sha256=self.digests())

        def write() -> None:
            sync_tree(self.path)
            write_list(self.path, listed)
            sync(list_path(self.path))
            sync(self.path.parent)

        retry_storage(write, self.path)
        return listed

    def publish(self, folder: Path) -> None:
        """Move a finished folder of this machine here, durably, over what an unfinished attempt left."""
        target = self.path
        retry_storage(lambda: share_files(folder), folder)

        def move() -> None:
            if folder.exists():  # else an earlier attempt has renamed it
                sync_tree(folder)
                if list_path(folder).exists():
                    sync(list_path(folder))
                list_path(target).unlink(missing_ok=True)
                shutil.rmtree(target, ignore_errors=True)
            rename(folder, target)
            if list_path(folder).exists():
                rename(list_path(folder), list_path(target))
            sync(target.parent)

        retry_storage(move, target)

    # ---- lists

    @property
    def file_list(self) -> Storage:
        """The list of the folder's files, which vouches for it."""
        return Storage(list_path(self.path))

    def read_list(self) -> FileList | None:
        """Read the folder's list; None where there is none.

        Raises:
            CorruptFile: If it cannot be read as a list.
        """
        try:
            return FileList.model_validate_json(retry_storage(self.file_list.read, self.path))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise CorruptFile(f"{self.file_list.name} is damaged", self.path) from error

    def fetch(self, on_piece: OnPiece = lambda: None) -> None:
        """Have the folder complete on this machine, compared with its list."""
        if self.read_list() != verified.get(self.path):
            self.verify(on_piece)

    def verify(self, on_piece: OnPiece = lambda: None) -> None:
        """Compare the folder with its list, if it has one, whatever this process knows of it.

        Raises:
            CorruptFile: Naming the file that is missing or not as it was written.
        """
        if listed := self.read_list():
            self.compare(listed, lambda name: (self / name).digest(on_piece))
            verified[self.path] = listed

    def compare(self, listed: FileList, digest: Callable[[str], str]) -> None:
        """Raise `CorruptFile` for the first file whose digest is not the listed one."""

        def found(name: str) -> str:
            try:
                return retry_storage(lambda: digest(name), self.path / name)
            except FileNotFoundError:
                return ""

        for name, sha256 in zip(listed.sha256, for_each(found, list(listed.sha256)), strict=True):
            if sha256 != listed.sha256[name]:
                state = "damaged" if sha256 else "missing"
                cause = f"{self.name}/{name} is {state}: its sha256 is not the one in {self.file_list.name}"
                raise CorruptFile(cause, self.path / name)


def write_list(folder: Path, listed: FileList) -> None:
    """Write the list of a folder of this machine that was just written."""
    list_path(folder).write_text(listed.model_dump_json(), encoding="utf-8")
    verified[folder] = listed


def keep_copy(here: Path, path: Path, listed: FileList) -> None:
    """Make a folder this machine's copy; its list is removed first, and written when the files are durable."""
    list_path(path).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    sync_tree(here)
    here.rename(path)
    sync(path.parent)
    write_list(path, listed)
