"""A run in a folder: its files are used in place, and a folder gets its name by a rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from typing_extensions import override

from qpruner.errors import StorageError
from qpruner.runs.storage.base import Storage
from qpruner.runs.storage.files import (
    FileList,
    OnPiece,
    copy_file,
    empty_folder,
    list_path,
    read_list,
    release,
    rename,
    sha256_of,
    share_files,
    sync,
    sync_tree,
    verified,
    verify_files,
    write_list,
)
from qpruner.runs.storage.retry import retry_storage

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
"""What a file system that knows no locks answers."""


class FolderStorage(Storage):
    """A file or folder on a disk that this machine sees, maybe shared with others."""

    fills_this_disk = True
    is_read_anywhere = False
    progress_seconds = 1.0
    requests_at_once = 1
    access_remedy = "`output` must lie in a folder that every node reads and writes"
    export_command = ""
    bank_copies = None

    @property
    @override
    def name(self) -> str:
        return str(self.path)

    @property
    @override
    def address(self) -> str:
        return str(self.path)

    @property
    @override
    def staging(self) -> Path:
        return self.path

    @property
    @override
    def scratch(self) -> Path:
        return self.path.with_name(f".scratch-{self.path.name}")

    @override
    def copies(self) -> dict[str, list[str]]:
        return {}

    @override
    def read(self) -> bytes:
        return self.path.read_bytes()

    @override
    def write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        new.write_bytes(data)
        sync(new)
        rename(new, self.path)
        sync(self.path.parent)

    @override
    def write_progress(self, data: bytes) -> None:
        new = self.path.with_suffix(".new")
        new.write_bytes(data)
        new.replace(self.path)

    @override
    def renew(self, data: bytes) -> None:
        os.utime(self.path)

    @override
    def is_file(self) -> bool:
        # `Path.is_file` is False for a storage that is away, from Python 3.14 on.
        try:
            return stat.S_ISREG(self.path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    @override
    def modified(self) -> float:
        return self.path.stat().st_mtime

    @override
    def digest(self) -> str:
        return sha256_of(self.path)

    @override
    def download(self, target: Path, on_piece: OnPiece) -> str:
        return copy_file(self.path, target, on_piece)

    @override
    def upload(self, file: Path) -> str:
        assert file == self.path
        return sha256_of(file)

    @override
    def send(self) -> None:
        pass

    @override
    def resume_local(self) -> None:
        pass

    @override
    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []

    @override
    def files(self) -> dict[str, int]:
        paths = [path for path in self.path.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.path)): path.stat().st_size for path in paths}

    @override
    def published_folders(self) -> list[Path]:
        return [path for path in self.path.glob("*") if path.is_dir()]

    @override
    def is_published(self) -> bool:
        return self.path.is_dir()

    @override
    def has_lost_folder(self) -> bool:
        return not self.path.is_dir()

    @override
    def delete(self) -> None:
        if not self.path.is_dir():
            self.path.unlink(missing_ok=True)
            return
        list_path(self.path).unlink(missing_ok=True)
        doomed = self.path.with_name(f".{self.path.name}.doomed")
        shutil.rmtree(doomed, ignore_errors=True)
        self.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    @override
    def move(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        rename(self.path, target)  # first: a folder without its list is read as it is
        with contextlib.suppress(FileNotFoundError):
            list_path(self.path).rename(list_path(target))

    @override
    def publish(self, folder: Path) -> None:
        target = self.path

        def make_durable() -> None:
            share_files(folder)
            sync_tree(folder)
            if list_path(folder).exists():
                sync(list_path(folder))

        def replace() -> None:
            if folder.exists():  # else an earlier attempt has renamed it
                list_path(target).unlink(missing_ok=True)
                shutil.rmtree(target, ignore_errors=True)
            rename(folder, target)

        def move_list() -> None:
            if listed := read_list(folder):
                rename(list_path(folder), list_path(target))
                verified[target] = listed

        for step in (make_durable, replace, move_list, lambda: sync(target.parent)):
            retry_storage(step, target)

    @override
    def put_folder(self, folder: Path) -> FileList:
        if folder != self.path:
            shutil.copytree(folder, self.path, dirs_exist_ok=True)
        with self.writing():
            pass
        return verified[self.path]

    @contextmanager
    @override
    def writing(self) -> Iterator[Path]:
        list_path(self.path).unlink(missing_ok=True)
        yield self.path
        if self.path.is_dir():  # its files are in memory still
            share_files(self.path)
            retry_storage(lambda: write_list(self.path), self.path)

    @override
    def fetch(self, on_piece: OnPiece) -> None:
        if read_list(self.path) != verified.get(self.path):
            self.verify(on_piece)

    @override
    def verify(self, on_piece: OnPiece) -> None:
        if listed := read_list(self.path):
            verify_files(listed, self.path, on_piece)

    @override
    def require_arrived(self) -> None:
        listed = list_path(self.path)
        try:
            retry_storage(listed.stat, listed, was_there=True)
        except FileNotFoundError as error:
            raise StorageError(
                f"{self.path} was written on another machine and is not here",
                "mount the folder of `output` there again, or take it out of the cluster, then repeat the command",
            ) from error

    @override
    def bytes_to_copy(self) -> int:
        return 0

    @override
    def begin_stage(self, record: Path, resume: bool) -> Path:
        if not resume:
            return empty_folder(self.scratch)
        self.scratch.mkdir(exist_ok=True)
        return self.scratch

    @override
    def commit_stage(self, written: Path, record: Path) -> None:
        retry_storage(lambda: record.unlink(missing_ok=True), record)
        self.publish(written)

    @contextmanager
    @override
    def exclusive(self) -> Iterator[None]:
        guard = FileLock(self.path.with_name(f".{self.path.name}.guard"))
        try:
            guard.acquire()
        except OSError as error:  # without locks, of two drivers that start at once the first heartbeat ends one
            if error.errno not in NO_LOCKS:
                error.filename = str(self.path)
                raise
        try:
            yield
        finally:
            release(guard)

    @override
    def check_reachable(self) -> None:
        pass

    @override
    def forget_staging(self) -> None:
        pass

    @override
    def forget_local(self) -> None:
        pass
