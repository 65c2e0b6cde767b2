"""A run in an object store (`s3://`, `gs://`), through pyarrow.

On each machine a folder stands for such a run, its mirror. The mirror's path spells the run's URI, so a process that
is given a path in it finds the object behind it, on any machine.

A store has no rename. The files of a folder are put first and their list last; without its list there is no folder,
and what is fetched is compared with it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from qpruner.errors import CorruptFile, StorageError, UserError
from qpruner.runs.storage.base import Stat, Storage, keep_copy
from qpruner.runs.storage.bucket import CREDENTIALS, cache_root, open_bucket, translated
from qpruner.runs.storage.files import (
    FILES,
    FileList,
    OnPiece,
    copy_pieces,
    empty_folder,
    exclusive,
    for_each,
    list_path,
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
    """An object, or all whose keys begin with this one's and a slash."""

    fills_this_disk = False
    access_remedy = f"every node must reach `output`: {CREDENTIALS}"

    def __init__(self, path: Path, scheme: str, bucket: str, query: str, key: str) -> None:
        super().__init__(path)
        self.scheme, self.bucket, self.query, self.key = scheme, bucket, query, key

    def __truediv__(self, name: str) -> ObjectStorage:
        return self._at(self.path / name, f"/{name}")

    def _at(self, path: Path, ending: str) -> ObjectStorage:
        return ObjectStorage(path, self.scheme, self.bucket, self.query, self.key + ending)

    @property
    def file_list(self) -> ObjectStorage:
        """The list of the folder's files, which vouches for it."""
        return self._at(list_path(self.path), FILES)

    @property
    def name(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    @property
    def address(self) -> str:
        return f"{self.name}?{self.query}" if self.query else self.name

    @property
    def staging(self) -> Path:
        return cache_root() / "scratch" / self.path.relative_to(cache_root() / "runs")

    # ---- one object

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        with self._translated(), self._system.open_input_stream(self._path) as stream:
            yield stream

    def read(self) -> bytes:
        # pyarrow (26) asks what is there first, and then for no more bytes than that has: of a longer object that was
        # put in between it gives the beginning.
        while True:
            with self.open() as stream:
                data, before = bytes(stream.read()), stream.metadata()
            with self.open() as stream:
                if stream.metadata() == before:
                    return data

    def write(self, data: bytes, durable: bool = True) -> None:
        with self._translated(), self._system.open_output_stream(self._path) as stream:
            stream.write(data)

    renew = write

    def stat(self) -> Stat | None:
        from pyarrow.fs import FileType

        with self._translated():
            found = self._system.get_file_info(self._path)
        return Stat(float(found.mtime.timestamp()), int(found.size)) if found.type == FileType.File else None

    def put(self, file: Path) -> str:
        with file.open("rb") as source, self._translated(), self._system.open_output_stream(self._path) as stream:
            return copy_pieces(source.read, stream.write)

    # ---- folders

    def names(self) -> list[str]:
        return sorted(found.base_name for found in self._listed(is_deep=False))

    def files(self) -> dict[str, int]:
        return {found.path[len(self._path) + 1 :]: found.size for found in self._listed() if found.is_file}

    def delete(self) -> None:
        lists = [self / name for name in self.files() if name.endswith(FILES)]
        for doomed in (*lists, self.file_list, self):
            doomed._delete()
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)
        list_path(self.path).unlink(missing_ok=True)

    def move(self, target: Path) -> None:
        there = objects_at(target)
        assert there is not None
        with self._translated():
            for name in self.files():
                self._system.move(f"{self._path}/{name}", f"{there._path}/{name}")
            for each, to in ((self, there), (self.file_list, there.file_list)):
                if each.stat():
                    self._system.move(each._path, to._path)

    def put_folder(self, folder: Path) -> FileList:
        retry_storage(self.file_list._delete, self.path)
        names = sorted(Storage(folder).files())
        sent = for_each(lambda name: retry_storage(lambda: (self / name).put(folder / name), self.path / name), names)
        listed = FileList(sha256=dict(zip(names, sent, strict=True)))
        retry_storage(lambda: self.file_list.write(listed.model_dump_json().encode()), self.path)
        stale = sorted(set(retry_storage(self.files, self.path)) - set(names))
        for_each(lambda name: retry_storage((self / name)._delete, self.path / name), stale)
        return listed

    def publish(self, folder: Path) -> None:
        self.put_folder(folder)
        shutil.rmtree(folder)
        list_path(folder).unlink(missing_ok=True)

    def fetch(self, on_piece: OnPiece = lambda: None) -> None:
        # A machine has one copy for all its processes as long as the list is the same; each compares it once.
        listed = self.read_list()
        if listed is None:
            message = f"{self.name} is missing, or was not put whole: it has no {self.file_list.name}"
            raise CorruptFile(message, self.path)
        if self._has_copy(listed, on_piece):
            return
        with exclusive(self.path, on_piece):
            if self._has_copy(listed, on_piece):  # another process has fetched it by now
                return
            here = empty_folder(self.staging)
            self.compare(listed, lambda name: (self / name).download(here / name, on_piece))
            keep_copy(here, self.path, listed)

    def _has_copy(self, listed: FileList, on_piece: OnPiece) -> bool:
        copy = Storage(self.path)
        try:
            if not self.path.is_dir() or copy.read_list() != listed:
                return False
            copy.fetch(on_piece)
        except CorruptFile as error:
            logger.warning("%s is damaged on this machine: all of %s is fetched again", error.path, self.name)
            list_path(self.path).unlink(missing_ok=True)
            return False
        return True

    def verify(self, on_piece: OnPiece = lambda: None) -> None:
        # Only objects that were put after their list can differ from it: the others are not read.
        since, listed = retry_storage(self.file_list.stat, self.path), self.read_list()
        if since is None or listed is None:
            return
        found = [each for each in retry_storage(self._listed, self.path) if each.is_file]
        put = {each.path[len(self._path) + 1 :]: float(each.mtime.timestamp()) for each in found}
        names = [name for name in listed.sha256 if put.get(name, since.modified) >= since.modified]
        doubtful = FileList(sha256={name: listed.sha256[name] for name in names})
        self.compare(doubtful, lambda name: (self / name).digest())

    def check_reachable(self) -> None:
        """Raise `UserError` if the store does not answer, or refuses access."""
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

    # ---- pyarrow

    @property
    def _path(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def _system(self) -> Any:
        return open_bucket(self.scheme, self.bucket, self.query)

    def _translated(self) -> AbstractContextManager[None]:
        return translated(self.name, self.bucket)

    def _delete(self) -> None:
        with self._translated():
            if self.stat():
                self._system.delete_file(self._path)
            else:
                self._system.delete_dir_contents(self._path, missing_dir_ok=True)

    def _listed(self, is_deep: bool = True, must_exist: bool = False) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._translated():
            found: list[Any] = self._system.get_file_info(
                FileSelector(self._path, allow_not_found=not must_exist, recursive=is_deep)
            )
        return found
