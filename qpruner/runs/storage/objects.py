"""A run in an object store (`s3://`, `gs://`), through pyarrow.

On each machine a folder stands for such a run, its mirror. The mirror's path spells the run's URI, so a process that
is given a path in it finds the object behind it, on any machine.

A store has no rename. The files of a folder are put first and their list last; without its list there is no folder,
and what is fetched is compared with it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from qpruner.errors import CorruptFile, StorageError, UserError
from qpruner.runs.storage.base import (
    FILES,
    FileList,
    OnPiece,
    Stat,
    Storage,
    copy_pieces,
    empty_folder,
    exclusive,
    for_each,
    keep_copy,
    list_path,
)
from qpruner.runs.storage.retry import retry_storage

CACHE = "QPRUNER_CACHE"
"""Environment variable: a folder on this machine for the mirrors of runs; `~/.cache/qpruner` without it."""
CONNECT_SECONDS, QUIET_SECONDS, ATTEMPTS = 5.0, 5.0, 2
"""A request that nobody answers ends after some ten seconds; `retry_storage` then decides whether to try again."""
REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|TOKEN|HTTP status 40[13]|UNAUTHENT|PERMISSION_DENIED"
)
GONE = re.compile(r"NO_SUCH_BUCKET|[Bb]ucket '[^']*' not found|specified bucket does not exist")
CREDENTIALS = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's "
    "role; GOOGLE_APPLICATION_CREDENTIALS for gs://), on every machine"
)
logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Where this machine keeps what it fetched; it may be deleted while no command runs."""
    return _resolved(os.environ.get(CACHE, "~/.cache/qpruner"))


@functools.cache
def _resolved(folder: str) -> Path:
    return Path(folder).expanduser().resolve()


def mirror_of(uri: str) -> Path:
    """Name the folder on this machine that stands for a run's URI.

    Raises:
        UserError: If it is no URI of a run.
    """
    form = "must be a folder, or read s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
    try:
        parts = urlsplit(uri)
    except ValueError:  # brackets that are no address, which it may repeat
        raise UserError(f"`output` {form}") from None
    options = {"scheme": "https"} | dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix = parts.path.strip("/")
    # What may be or hold a key is not repeated. One with a slash in it ends what would be the bucket, and no bucket's
    # name has a colon.
    if any(sign in parts.netloc for sign in "@:") or "@" in "".join(options.values()):
        raise UserError(f"`output`: a URI holds no credentials; {CREDENTIALS}")
    if not options.keys() <= {"scheme", "endpoint_override", "region"} or options["scheme"] not in ("http", "https"):
        raise UserError("`output`: the options of a URI are endpoint_override, region, and scheme (http or https)")
    steps = (parts.netloc, *prefix.split("/"))
    if parts.scheme not in ("s3", "gs") or parts.fragment or any(step in ("", ".", "..") for step in steps):
        raise UserError(f"`output`: {uri} {form}")
    query = f"?{parts.query}" if parts.query else ""
    name = quote(f"{parts.scheme}://{parts.netloc}/{prefix}{query}", safe="")
    if len(name) > 255:
        raise UserError(f"`output`: {uri} must be shorter: {len(name)} of 255 characters with its signs quoted")
    return cache_root() / "runs" / name


def objects_at(path: Path) -> ObjectStorage | None:
    """Find the objects behind a path in a mirror; None for any other path."""
    runs = cache_root() / "runs"
    if not path.is_relative_to(runs) or path == runs:
        return None
    name, *rest = path.relative_to(runs).parts
    parts = urlsplit(unquote(name))
    return ObjectStorage(path, parts.scheme, parts.netloc, parts.query, "/".join([parts.path.strip("/"), *rest]))


@functools.cache
def open_bucket(scheme: str, bucket: str, query: str) -> Any:
    """Open the file system of a bucket, with credentials of the environment."""
    from pyarrow import fs

    options: dict[str, Any] = dict(parse_qsl(query))
    if scheme == "gs":
        options.pop("region", None)
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=3 * QUIET_SECONDS), **options)
    # The SDK's own variables, which pyarrow 26 reads in `from_uri` only; that one sets no time limits.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options.setdefault("endpoint_override", endpoint)
    options.setdefault("region", region or (None if options["endpoint_override"] else fs.resolve_s3_region(bucket)))
    return fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=QUIET_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        # A small object is then one request, and so never half there.
        allow_delayed_open=True,
        background_writes=False,
        **options,
    )


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

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise pyarrow's errors, which tell their kind in their text only, as errors of files."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and "google::cloud" not in str(error):
                raise
            text = re.sub(r"\s*(\(Request ID|error_info=).*", "", str(error), flags=re.DOTALL).strip()
            if text.startswith(os.strerror(errno.ENOENT)):  # without its number: of a folder at Google's
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name) from error
            detail = text.partition("AWS Error ")[2] or text
            if REFUSED.search(detail):
                cause = f"{self.name}: access is refused ({detail})"
                raise StorageError(cause, f"{CREDENTIALS}; mend them, then repeat the command") from error
            if GONE.search(text):
                raise StorageError(f"there is no bucket {self.bucket}", "create it, then repeat the command") from error
            if isinstance(error, FileNotFoundError) or ("AWS Error" not in text and "google::cloud" not in text):
                raise  # an object that is not there, or a request that pyarrow itself would not make
            raise OSError(errno.EHOSTUNREACH, detail, self.name) from error

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
