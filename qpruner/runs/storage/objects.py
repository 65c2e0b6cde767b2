"""A run in an object store (`s3://`, `gs://`), through pyarrow.

On each machine a folder stands for such a run, its mirror. The mirror's path spells the run's URI, so a process that
is given a path in it finds the object behind it, on any machine.

A store has no rename. The files of a folder are put first and their list last; without its list there is no folder,
and what is fetched is compared with it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError
from typing_extensions import override

from qpruner.errors import CorruptFile, StorageError, UserError
from qpruner.runs.storage.base import Storage
from qpruner.runs.storage.bucket import CACHE, CREDENTIALS, cache_root, open_bucket, translated
from qpruner.runs.storage.files import (
    CONCURRENT,
    FILES,
    FileList,
    OnPiece,
    compare,
    copy_pieces,
    empty_folder,
    exclusive,
    in_parallel,
    list_path,
    names_of_files,
    read_list,
    sync,
    sync_tree,
    verified,
    verify_files,
    write_list,
    writer_of,
)
from qpruner.runs.storage.retry import retry_storage

logger = logging.getLogger(__name__)


def objects_at(path: Path) -> ObjectStorage | None:
    """Find the objects behind a path in a mirror; None for any other path."""
    runs = cache_root() / "runs"
    if not path.is_relative_to(runs) or path == runs:
        return None
    name, *rest = path.relative_to(runs).parts
    parts = urlsplit(unquote(name))
    return ObjectStorage(path, parts.scheme, parts.netloc, parts.query, "/".join([parts.path.strip("/"), *rest]))


class ObjectStorage(Storage):
    """An object, or all whose keys begin with this one's and a slash.

    Args:
        path: In the run's mirror on this machine.
        scheme: `s3` or `gs`.
        bucket: Its name.
        query: Options of the URI.
        key: Of the object.
    """

    fills_this_disk = False
    is_read_anywhere = True
    progress_seconds = 5.0
    requests_at_once = CONCURRENT
    access_remedy = f"every node must reach `output`: {CREDENTIALS}"

    def __init__(self, path: Path, scheme: str, bucket: str, query: str, key: str) -> None:
        super().__init__(path)
        self.scheme, self.bucket, self.query, self.key = scheme, bucket, query, key

    def at(self, path: Path, ending: str) -> ObjectStorage:
        """Return the object whose key has one more ending."""
        return ObjectStorage(path, self.scheme, self.bucket, self.query, self.key + ending)

    def __truediv__(self, name: str) -> ObjectStorage:
        return self.at(self.path / name, f"/{name}")

    @property
    def file_list(self) -> ObjectStorage:
        """The list of the folder's files, which vouches for it."""
        return self.at(list_path(self.path), FILES)

    @property
    def _path(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def _system(self) -> Any:
        return open_bucket(self.scheme, self.bucket, self.query)

    # ---- names

    @property
    @override
    def name(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    @property
    @override
    def address(self) -> str:
        return f"{self.name}?{self.query}" if self.query else self.name

    @property
    @override
    def export_command(self) -> str:
        return f"qpruner export {shlex.quote(self.address)} --to peft --out FOLDER"

    @property
    @override
    def staging(self) -> Path:
        return cache_root() / "scratch" / self.path.relative_to(cache_root() / "runs")

    scratch = staging

    @override
    def copies(self) -> dict[str, list[str]]:
        return {CACHE: [f"{self.path.relative_to(cache_root())}/**/*"]}

    @property
    @override
    def bank_copies(self) -> Path | None:
        return cache_root() / "bank"

    # ---- one object

    @override
    def read(self) -> bytes:
        # pyarrow (26) asks what is there first, and then for no more bytes than that has: of a longer object that was
        # put in between it gives the beginning.
        with self._translated():
            while True:
                with self._system.open_input_stream(self._path) as stream:
                    data, before = bytes(stream.read()), stream.metadata()
                with self._system.open_input_stream(self._path) as stream:
                    if stream.metadata() == before:
                        return data

    @override
    def write(self, data: bytes) -> None:
        with self._translated(), self._system.open_output_stream(self._path) as stream:
            stream.write(data)

    write_progress = renew = write

    @override
    def is_file(self) -> bool:
        from pyarrow.fs import FileType

        with self._translated():
            return bool(self._system.get_file_info(self._path).type == FileType.File)

    @override
    def modified(self) -> float:
        return float(self._info().mtime.timestamp())

    @override
    def digest(self) -> str:
        with self._translated(), self._system.open_input_stream(self._path) as stream:
            return copy_pieces(stream.read)

    @override
    def download(self, target: Path, on_piece: OnPiece) -> str:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._translated(), self._system.open_input_stream(self._path) as stream, writer_of(target) as write:
            return copy_pieces(stream.read, write, on_piece)

    def _put(self, file: Path) -> str:
        with file.open("rb") as source, self._translated(), self._system.open_output_stream(self._path) as stream:
            return copy_pieces(source.read, stream.write)

    @override
    def upload(self, file: Path) -> str:
        sha256 = self._put(file)
        file.unlink()
        return sha256

    @override
    def send(self) -> None:
        self._put(self.path)

    @override
    def resume_local(self) -> None:
        # A driver at work here, or one that was killed, has written more than it sent: that stays.
        with contextlib.suppress(FileNotFoundError):
            if not self.path.is_file() or self.path.stat().st_size < int(self._info().size):
                self.download(self.path, lambda: None)

    # ---- folders

    @override
    def names(self) -> list[str]:
        return sorted(found.base_name for found in self._listed(is_deep=False))

    @override
    def files(self) -> dict[str, int]:
        return {found.path[len(self._path) + 1 :]: found.size for found in self._listed() if found.is_file}

    @override
    def published_folders(self) -> list[Path]:
        return [self.path / name.removesuffix(FILES) for name in self.names() if name.endswith(FILES)]

    @override
    def is_published(self) -> bool:
        return self.file_list.is_file()

    @override
    def has_lost_folder(self) -> bool:
        return False

    def _delete(self) -> None:
        with self._translated():
            if self.is_file():
                self._system.delete_file(self._path)
            else:
                self._system.delete_dir_contents(self._path, missing_dir_ok=True)

    @override
    def delete(self) -> None:
        lists = [self / name for name in self.files() if name.endswith(FILES)]
        for doomed in (*lists, self.file_list, self):
            doomed._delete()
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)
        list_path(self.path).unlink(missing_ok=True)

    @override
    def move(self, target: Path) -> None:
        there = objects_at(target)
        assert there is not None
        with self._translated():
            for name in self.files():
                self._system.move(f"{self._path}/{name}", f"{there._path}/{name}")
            for each, to in ((self, there), (self.file_list, there.file_list)):
                if each.is_file():
                    self._system.move(each._path, to._path)

    @override
    def publish(self, folder: Path) -> None:
        self.put_folder(folder)
        shutil.rmtree(folder)
        list_path(folder).unlink(missing_ok=True)

    @override
    def put_folder(self, folder: Path) -> FileList:
        retry_storage(self.file_list._delete, self.path)
        names = names_of_files(folder)

        def put(name: str) -> str:
            return retry_storage(lambda: (self / name)._put(folder / name), self.path / name)

        listed = FileList(sha256=dict(zip(names, in_parallel(put, names), strict=True)))
        retry_storage(lambda: self.file_list.write(listed.model_dump_json().encode()), self.path)
        stale = sorted(set(retry_storage(self.files, self.path)) - set(names))
        in_parallel(lambda name: retry_storage((self / name)._delete, self.path / name), stale)
        return listed

    @contextmanager
    @override
    def writing(self) -> Iterator[Path]:
        here = self.staging
        shutil.rmtree(here, ignore_errors=True)
        here.parent.mkdir(parents=True, exist_ok=True)
        yield here
        if here.is_dir():
            listed = self.put_folder(here)
            with exclusive(self.path):
                self._keep(here, listed)

    @override
    def fetch(self, on_piece: OnPiece) -> None:
        # A machine has one copy for all its processes as long as the list is the same; each compares it once.
        listed = self._read_list()
        if self._has_copy(listed, on_piece):
            return
        with exclusive(self.path, on_piece):
            if not self._has_copy(listed, on_piece):  # another process may have fetched it by now
                self._fetch_anew(listed, on_piece)

    def _has_copy(self, listed: FileList, on_piece: OnPiece) -> bool:
        try:
            if not self.path.is_dir() or read_list(self.path) != listed:
                return False
        except CorruptFile:
            return False
        if verified.get(self.path) != listed:
            try:
                verify_files(listed, self.path, on_piece)
            except CorruptFile as error:
                logger.warning("%s is damaged on this machine: all of %s is fetched again", error.path, self.name)
                list_path(self.path).unlink(missing_ok=True)
                return False
        return True

    def _fetch_anew(self, listed: FileList, on_piece: OnPiece) -> None:
        here = empty_folder(self.staging)

        def download(name: str) -> str | None:
            try:
                return retry_storage(lambda: (self / name).download(here / name, on_piece), self.path / name)
            except FileNotFoundError:
                return None

        compare(listed, in_parallel(download, list(listed.sha256)), self.path, self.name)
        self._keep(here, listed)

    def _keep(self, here: Path, listed: FileList) -> None:
        """Make a folder this machine's copy; its list is removed first, and written when the files are durable."""
        list_path(self.path).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sync_tree(here)
        here.rename(self.path)
        sync(self.path.parent)
        write_list(self.path, listed)

    @override
    def verify(self, on_piece: OnPiece) -> None:
        # Only objects that were put after their list can differ from it: the others are not read.
        if not retry_storage(self.is_published, self.path):
            return
        listed, since = self._read_list(), retry_storage(self.file_list.modified, self.path)
        found = [each for each in retry_storage(self._listed, self.path) if each.is_file]
        put = {each.path[len(self._path) + 1 :]: float(each.mtime.timestamp()) for each in found}
        doubtful = {name: sha256 for name, sha256 in listed.sha256.items() if put.get(name, since) >= since}

        def digest(name: str) -> str | None:
            return retry_storage((self / name).digest, self.path / name) if name in put else None

        compare(FileList(sha256=doubtful), in_parallel(digest, list(doubtful)), self.path, self.name)

    @override
    def require_arrived(self) -> None:
        pass

    @override
    def bytes_to_copy(self) -> int:
        held = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        return max(0, sum(self.files().values()) - held)

    # ---- a stage's folder and the run's lock

    @override
    def begin_stage(self, record: Path, resume: bool) -> Path:
        there = objects_at(record)
        assert there is not None
        retry_storage(there._delete, record)
        return self.path

    @override
    def commit_stage(self, written: Path, record: Path) -> None:
        pass

    @contextmanager
    @override
    def exclusive(self) -> Iterator[None]:
        # pyarrow (26) has no conditional put. Of two drivers that start in the same instant both may believe that they
        # hold the run; the first heartbeat ends one.
        yield

    @override
    def check_reachable(self) -> None:
        # What lies there is asked, since who may use a bucket's objects need not see the bucket itself.
        try:
            with contextlib.suppress(FileNotFoundError):
                self._listed(is_deep=False, must_exist=True)
        except StorageError as error:
            raise UserError(f"`output`: {error.cause}; {error.remedy}") from error
        except OSError as error:
            raise UserError(
                f"`output`: {self.name} cannot be reached ({error.strerror}); check the network and the endpoint "
                "(AWS_ENDPOINT_URL, or ?endpoint_override= in the URI)"
            ) from error

    @override
    def forget_staging(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

    @override
    def forget_local(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    # ---- pyarrow

    def _read_list(self) -> FileList:
        try:
            return FileList.model_validate_json(retry_storage(self.file_list.read, self.path))
        except FileNotFoundError as error:
            message = f"{self.name} is missing, or was not put whole: it has no {self.file_list.name}"
            raise CorruptFile(message, self.path) from error
        except ValidationError as error:
            raise CorruptFile(f"{self.file_list.name} is damaged", self.path) from error

    def _info(self) -> Any:
        with self._translated():
            found = self._system.get_file_info(self._path)
        if not found.type.value:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name)
        return found

    def _listed(self, is_deep: bool = True, must_exist: bool = False) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._translated():
            found: list[Any] = self._system.get_file_info(
                FileSelector(self._path, allow_not_found=not must_exist, recursive=is_deep)
            )
        return found

    def _translated(self) -> AbstractContextManager[None]:
        return translated(self.name, self.bucket)
