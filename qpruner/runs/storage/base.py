"""The storage of a run in a folder, and the lists of digests that show whether it is complete."""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from qpruner.errors import CorruptFile
from qpruner.runs.records import Recorded
from qpruner.runs.storage.retry import FULL, Result, retry_storage

Item = TypeVar("Item")

# suffix of the file list of a folder, such as `prune.files.json` next to `prune/`
FILES = ".files.json"
PIECE_BYTES = 16 * 2**20  # bytes per read when copying
HASHED_BYTES = 2**20
"""Bytes per read when digesting, which many threads do at once while memory is measured."""
WAITING_SECONDS = 0.1
CONCURRENT = 16  # number of files that are read, uploaded or downloaded at once
OnPiece = Callable[[], object]
"""Called to show progress: after each piece read, and while waiting for another process.

The calls may come from any thread.
"""


class FileList(Recorded):
    """The expected digests of the files in a folder."""

    sha256: dict[str, str]


verified: dict[Path, FileList] = {}
"""Folders here that this process wrote or verified, with their file lists at that time."""


def list_path(folder: Path) -> Path:
    """Return the path of the file list of a folder."""
    return folder.with_name(folder.name + FILES)


def for_each(action: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function to items in parallel threads, and return the results in order."""
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(action, items))


def copy_pieces(
    read: Callable[[int], bytes],
    write: Callable[[bytes], object] = lambda piece: None,
    on_piece: OnPiece = lambda: None,
    piece_bytes: int | None = None,
) -> str:
    """Copy a stream piece by piece, and return its sha256."""
    digest = hashlib.sha256()
    while piece := read(piece_bytes or PIECE_BYTES):
        digest.update(piece)
        write(piece)
        on_piece()
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush the contents of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for path in (folder, *folder.rglob("*")):
        sync(path)


def rename(path: Path, target: Path) -> None:
    """Rename a file or folder.

    Succeed, too, if an earlier attempt renamed it but its answer was lost.
    """
    try:
        path.replace(target)
    except FileNotFoundError:
        target.stat()


def share_files(folder: Path) -> None:
    """Give files the read permissions of their folder.

    Safetensors makes its files readable for their owner only.
    """
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readable)


def empty_folder(folder: Path) -> Path:
    """Make an empty folder on this machine, and delete what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def exclusive(path: Path, on_piece: OnPiece = lambda: None) -> Iterator[None]:
    """Lock a path for this process while the block runs.

    While another process has the lock, wait and call `on_piece` to show progress.
    """
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
        _release(lock)


def _release(lock: FileLock) -> None:
    # A process that waits for the file notices, and makes a new one.
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


@contextmanager
def working_folder(prefix: str) -> Iterator[Path]:
    """Yield a temporary folder; also delete folders with this prefix that killed processes left."""
    temporary = Path(tempfile.gettempdir())
    for file in temporary.glob(f".{prefix}*.lock"):
        with contextlib.suppress(OSError):  # in use, or deleted meanwhile
            if file.lstat().st_uid == os.getuid():
                lock = FileLock(file)
                lock.acquire(timeout=0)
                left_folder = file.name.removeprefix(".").removesuffix(".lock")
                shutil.rmtree(temporary / left_folder, ignore_errors=True)
                _release(lock)
    folder = temporary / f"{prefix}{uuid.uuid4().hex}"
    with exclusive(folder):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Stat(NamedTuple):
    """Time of change of a file, in seconds by the clock of the storage, and its size in bytes."""

    modified: float
    size: int


class Storage:
    """A file or folder of a run in a local or shared folder, identified by its path here.

    Methods on one file raise `FileNotFoundError` if it is missing, and `OSError` if the storage is
    full or away; the callers retry. Methods on folders and file lists retry by themselves.
    """

    fills_this_disk = True
    """Whether the files take room on a disk of this machine.

    If they do not, any machine can resume the run.
    """
    access_remedy = "`output` must be in a folder that every node can read and write"

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.path / name)

    @property
    def name(self) -> str:
        """The path or URI, as messages name it."""
        return str(self.path)

    @property
    def address(self) -> str:
        """The path, or the URI with its options, for commands."""
        return self.name

    @property
    def staging(self) -> Path:
        """The path on this machine to write to.

        It is the path itself, or a place whose files are uploaded afterwards.
        """
        return self.path

    def open(self) -> AbstractContextManager[Any]:
        """Open the file for reading."""
        return self.path.open("rb")

    def read(self) -> bytes:
        """Read the whole file."""
        return self.path.read_bytes()

    def digest(self, on_piece: OnPiece = lambda: None) -> str:
        """Return the sha256 of the file, read from the storage itself."""
        piece_bytes = HASHED_BYTES if self.fills_this_disk else PIECE_BYTES
        with self.open() as stream:
            return copy_pieces(stream.read, on_piece=on_piece, piece_bytes=piece_bytes)

    def download(self, target: Path, on_piece: OnPiece = lambda: None) -> str:
        """Copy the file to a path on this machine, and return its sha256."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.open() as stream, target.open("wb") as file:
                return copy_pieces(stream.read, file.write, on_piece)
        except OSError as error:
            if error.errno in FULL:  # the error does not name the full disk
                error.filename = str(target)
            raise

    def put(self, file: Path) -> str:
        """Copy a file of this machine to this storage, and return its sha256.

        Nothing is copied if the file is already there.
        """
        if file == self.path:
            return self.digest()
        return Storage(file).download(self.path)

    def write(self, data: bytes, durable: bool = True) -> None:
        """Write the file; a reader sees the old or the new contents, never a part.

        If `durable`, that is so even after a crash.
        """
        # At random: processes of two machines that share this storage may have the same process id.
        new = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        if durable:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_bytes(data)
            if durable:
                sync(new)
        except OSError:
            with contextlib.suppress(OSError):  # a full disk has room again
                new.unlink()
            raise
        rename(new, self.path)
        if durable:
            sync(self.path.parent)

    def renew(self, data: bytes) -> None:
        """Set the time of change to now.

        `data` must be the present contents, because an object store must write them again.
        """
        os.utime(self.path)

    def stat(self) -> Stat | None:
        """Return time of change and size of the file; None if there is no such file."""
        # Not `Path.is_file`, which from Python 3.14 on returns False if the storage is away.
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return Stat(modified=status.st_mtime, size=status.st_size)

    def names(self) -> list[str]:
        """List the names in the folder, sorted; empty if there is no folder."""
        if not self.path.is_dir():
            return []
        return sorted(path.name for path in self.path.iterdir())

    def files(self) -> dict[str, int]:
        """Return the size in bytes of every file in the folder and its subfolders."""
        paths = [path for path in self.path.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.path)): path.stat().st_size for path in paths}

    def digests(self) -> dict[str, str]:
        """Return the sha256 of every file in the folder and its subfolders."""

        def digest_of(name: str) -> str:
            return retry_storage((self / name).digest, self.path / name)

        names = sorted(retry_storage(self.files, self.path))
        return dict(zip(names, for_each(digest_of, names), strict=True))

    def delete(self) -> None:
        """Delete the file or folder; a partly deleted folder never passes for a complete one."""
        if not self.path.is_dir():
            self.path.unlink(missing_ok=True)
            return
        list_path(self.path).unlink(missing_ok=True)
        doomed = self.path.with_name(f".{self.path.name}.doomed")
        shutil.rmtree(doomed, ignore_errors=True)
        self.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def move(self, target: Path) -> None:
        """Move the file or folder, with its file list, to another path of the run."""
        target.parent.mkdir(parents=True, exist_ok=True)
        rename(self.path, target)  # before its list, because a folder may be read without a list
        with contextlib.suppress(FileNotFoundError):
            list_path(self.path).rename(list_path(target))

    def put_folder(self, folder: Path) -> FileList:
        """Copy a folder of this machine to this storage durably; write its file list last.

        Nothing is copied if the folder is already there.
        """
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
        """Move a finished folder of this machine to this storage.

        It replaces an earlier folder there.
        """
        target = self.path
        retry_storage(lambda: share_files(folder), folder)

        def move() -> None:
            if folder.exists():  # if not, an earlier attempt has renamed it
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

    @property
    def file_list(self) -> Self:
        """The storage of the folder's file list, which `read_list` reads."""
        return type(self)(list_path(self.path))

    def read_list(self) -> FileList | None:
        """Read the file list of the folder; return None if there is none.

        Raises:
            CorruptFile: If the list is damaged.
        """
        try:
            return FileList.model_validate_json(retry_storage(self.file_list.read, self.path))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise CorruptFile(f"{self.file_list.name} is damaged", self.path) from error

    def fetch(self, on_piece: OnPiece = lambda: None) -> None:
        """Make the folder available on this machine, and compare it with its file list."""
        if self.read_list() != verified.get(self.path):
            self.verify(on_piece)

    def verify(self, on_piece: OnPiece = lambda: None) -> None:
        """Compare the folder with its file list, if it has one.

        Raises:
            CorruptFile: If a file is damaged or missing.
        """
        listed = self.read_list()
        if listed:
            self.compare(listed, lambda name: (self / name).digest(on_piece))
            verified[self.path] = listed

    def compare(self, listed: FileList, digest: Callable[[str], str]) -> None:
        """Raise `CorruptFile` for the first file whose digest differs from the listed one."""

        def actual_digest(name: str) -> str:
            try:
                return retry_storage(lambda: digest(name), self.path / name)
            except FileNotFoundError:
                return ""

        names = list(listed.sha256)
        for name, actual in zip(names, for_each(actual_digest, names), strict=True):
            if actual != listed.sha256[name]:
                state = "damaged" if actual else "missing"
                raise CorruptFile(
                    f"{self.name}/{name} is {state}, says {self.file_list.name}", self.path / name
                )


def write_list(folder: Path, listed: FileList) -> None:
    """Write the file list of a folder on this machine that this process has just written."""
    list_path(folder).write_text(listed.model_dump_json(), encoding="utf-8")
    verified[folder] = listed


def keep_copy(folder: Path, path: Path, listed: FileList) -> None:
    """Move a downloaded folder to its path on this machine.

    Its file list is written once all files are durable.
    """
    list_path(path).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    sync_tree(folder)
    folder.rename(path)
    sync(path.parent)
    write_list(path, listed)
