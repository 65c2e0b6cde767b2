"""Runs in an object store (`s3://`, `gs://`): whole objects are put, got and listed through pyarrow.

On each machine a folder stands for such a run, its mirror. The mirror's path spells the run's URI, so whatever process
is handed a path inside it finds the objects behind it, on any machine, and code that takes folders takes mirrors.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from qpruner.errors import StorageError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

CACHE = "QPRUNER_CACHE"
"""Environment variable: a folder on this machine for the mirrors of runs; `~/.cache/qpruner` without it."""
OPTIONS = ("endpoint_override", "region", "scheme")
"""What may follow the `?` of a URI."""
CONNECT_SECONDS, QUIET_SECONDS, ATTEMPTS = 5.0, 5.0, 2
"""A request that nobody answers ends after some ten seconds; `patiently` then decides whether to go on trying."""
PIECE_BYTES, HASHED_BYTES = 16 * 2**20, 2**20
"""Of what is copied, and of what is only read, by many threads at once, in a process whose memory is measured."""
OnPiece = Callable[[], object]
"""Called after each piece that was read, from whichever thread reads, and now and then while another process does."""
CONCURRENT = 16
"""Objects that are sent or fetched at once."""
REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|TOKEN|HTTP status 40[13]|UNAUTHENT|PERMISSION_DENIED"
)
GONE = re.compile(r"NO_SUCH_BUCKET|[Bb]ucket '[^']*' not found|specified bucket does not exist")
CREDENTIALS = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's "
    "role; GOOGLE_APPLICATION_CREDENTIALS for gs://), on every machine"
)


def cache_root() -> Path:
    """Where this machine keeps what it fetched; may be deleted whenever no command runs."""
    return _resolved(os.environ.get(CACHE, "~/.cache/qpruner"))


def mirror_of(uri: str) -> Path:
    """The folder on this machine that stands for a run's URI.

    Raises:
        UserError: If it is no URI of a run.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:  # brackets that are no address, which it may repeat
        raise UserError("`output`: a URI must read s3://BUCKET/PREFIX or gs://BUCKET/PREFIX") from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = [name for name in options if name not in OPTIONS]
    prefix = parts.path.strip("/")
    # What may be or hold a key is not repeated. One with a slash in it ends what would be the bucket, and no bucket's
    # name has a colon.
    if any(sign in parts.netloc for sign in "@:") or "@" in "".join(options.values()):
        raise UserError(f"`output`: a URI holds no credentials; {CREDENTIALS}")
    if unknown:
        named = ", ".join(name for name in unknown if re.fullmatch("[a-z_]+", name)) or "(which may be keys)"
        raise UserError(f"`output`: unknown options {named} in the URI; there are {', '.join(OPTIONS)}")
    if parts.scheme not in ("s3", "gs"):
        raise UserError(f"`output`: {uri} must be a folder or begin with s3:// or gs://")
    if not parts.netloc or not prefix or any(step in ("", ".", "..") for step in prefix.split("/")) or parts.fragment:
        raise UserError(f"`output`: {uri} must read {parts.scheme}://BUCKET/PREFIX")
    if options.get("scheme", "https") not in ("http", "https"):
        raise UserError(f"`output`: the option scheme of {uri} must be http or https, got {options['scheme']!r}")
    query = f"?{parts.query}" if parts.query else ""
    name = quote(f"{parts.scheme}://{parts.netloc}/{prefix}{query}", safe="")
    if len(name) > 255:
        raise UserError(f"`output`: {uri} must be shorter: {len(name)} of 255 characters with its signs quoted")
    return cache_root() / "runs" / name


def objects_at(path: Path) -> Objects | None:
    """The objects behind a path inside a mirror; None for any other path."""
    runs = cache_root() / "runs"
    if not path.is_relative_to(runs) or path == runs:
        return None
    name, *rest = path.relative_to(runs).parts
    parts = urlsplit(unquote(name))
    return Objects(parts.scheme, parts.netloc, parts.query, "/".join([parts.path.strip("/"), *rest]))


def is_mirror(path: Path) -> bool:
    """Whether a path stands for objects."""
    return objects_at(path) is not None


def name_of(path: Path) -> str:
    """A path as a person knows it: the URI that a mirror's stands for."""
    return str(objects_at(path) or path)


def address_of(path: Path) -> str:
    """As `name_of`, and how its store is reached: what a command takes, on a machine that knows nothing of it."""
    there = objects_at(path)
    return f"{there}?{there.query}" if there and there.query else name_of(path)


def scratch_of(path: Path) -> Path:
    """Where this machine prepares what is to lie at a path inside a mirror; stands for nothing itself."""
    return cache_root() / "scratch" / path.relative_to(cache_root() / "runs")


def sha256_of(file: Path, on_piece: OnPiece = lambda: None) -> str:
    """Of a file of this machine, or of a folder that it sees."""
    with file.open("rb") as stream:
        return _copied(lambda size: stream.read(HASHED_BYTES), lambda data: None, on_piece)


def copy_file(file: Path, target: Path, on_piece: OnPiece = lambda: None) -> str:
    """Copy a file that this machine sees; returns its sha256."""
    with file.open("rb") as source, _written(target) as write:
        return _copied(source.read, write, on_piece)


def each(action: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """Do something for every object, several at once; results in order."""
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(action, items))


@dataclass(frozen=True)
class Objects:
    """An object, or all whose keys begin with this one and a slash.

    Errors are an `OSError` with a number when the store is away, `FileNotFoundError` for an object that is not there,
    and `StorageError` where access is refused.
    """

    scheme: str
    bucket: str
    query: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> Objects:
        return Objects(self.scheme, self.bucket, self.query, f"{self.key}/{name}")

    @property
    def _path(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def _system(self) -> Any:
        return _system(self.scheme, self.bucket, self.query)

    def check_bucket(self) -> None:
        """Ask what lies there: who may use a bucket's objects need not be let see the bucket itself.

        Raises:
            UserError: If there is no bucket, or this machine may not list it, or nobody answers.
        """
        from pyarrow.fs import FileSelector

        try:
            with suppress(FileNotFoundError), self._told():
                self._system.get_file_info(FileSelector(self._path))
        except StorageError as error:
            raise UserError(f"`output`: {error.cause}; {error.remedy}") from error
        except OSError as error:
            raise UserError(
                f"`output`: {self} cannot be reached ({error.strerror}); check the network and the endpoint "
                "(AWS_ENDPOINT_URL, or ?endpoint_override= in the URI)"
            ) from error

    def read(self) -> bytes:
        """The object, whole, as it was put once.

        pyarrow (26) asks what is there first, and then for no more bytes than that has: of a longer object that was
        put in between it gives the beginning.
        """
        with self._told():
            while True:
                with self._system.open_input_stream(self._path) as stream:
                    data, before = bytes(stream.read()), stream.metadata()
                with self._system.open_input_stream(self._path) as stream:
                    if stream.metadata() == before:
                        return data

    def write(self, data: bytes) -> None:
        """Put the object; a reader sees the old one or this one."""
        with self._told(), self._system.open_output_stream(self._path) as stream:
            stream.write(data)

    def upload(self, file: Path) -> str:
        """Put a file as the object; returns its sha256."""
        with file.open("rb") as source, self._told(), self._system.open_output_stream(self._path) as stream:
            return _copied(source.read, stream.write)

    def download(self, file: Path, on_piece: OnPiece = lambda: None) -> str:
        """Write the object to a file; returns its sha256."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._told(), self._system.open_input_stream(self._path) as stream, _written(file) as write:
            return _copied(stream.read, write, on_piece)

    def digest(self) -> str:
        """sha256 of the object as it is in the store now."""
        with self._told(), self._system.open_input_stream(self._path) as stream:
            return _copied(stream.read, lambda data: None)

    def size(self) -> int:
        """Its bytes."""
        with self._told():
            return int(self._info().size)

    def modified(self) -> float:
        """When the object was put, in seconds on the store's clock."""
        with self._told():
            return float(self._info().mtime.timestamp())

    def is_object(self) -> bool:
        """Whether there is this very object."""
        from pyarrow.fs import FileType

        with self._told():
            return bool(self._system.get_file_info(self._path).type == FileType.File)

    def files(self) -> dict[str, int]:
        """Bytes of every object below this one, by its name from here."""
        return {found.path[len(self._path) + 1 :]: found.size for found in self._listed(True) if found.is_file}

    def times(self) -> dict[str, float]:
        """When every object below this one was put, by its name from here, in seconds on the store's clock."""
        below = {found.path[len(self._path) + 1 :]: found.mtime for found in self._listed(True) if found.is_file}
        return {name: float(put.timestamp()) for name, put in below.items()}

    def names(self) -> list[str]:
        """What lies directly below this one, as in a folder."""
        return sorted(found.base_name for found in self._listed(False))

    def delete(self) -> None:
        """Delete the object and every one below it, if there are any."""
        with self._told():
            if self.is_object():
                self._system.delete_file(self._path)
            else:
                self._system.delete_dir_contents(self._path, missing_dir_ok=True)

    def move(self, target: Objects) -> None:
        """Move the object and every one below it."""
        with self._told():
            for name in self.files():
                self._system.move(f"{self._path}/{name}", f"{target._path}/{name}")
            if self.is_object():
                self._system.move(self._path, target._path)

    def _info(self) -> Any:
        found = self._system.get_file_info(self._path)
        if not found.type.value:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return found

    def _listed(self, is_deep: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._told():
            found: list[Any] = self._system.get_file_info(
                FileSelector(self._path, allow_not_found=True, recursive=is_deep)
            )
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """pyarrow's errors, whose kind is in their text only, as the errors of files."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and "google::cloud" not in str(error):
                raise
            text = re.sub(r"\s*(\(Request ID|error_info=).*", "", str(error), flags=re.DOTALL).strip()
            if text.startswith(os.strerror(errno.ENOENT)):  # without its number: of a folder at Google's
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from error
            detail = text.partition("AWS Error ")[2] or text
            if REFUSED.search(detail):
                cause = f"{self}: access is refused ({detail})"
                raise StorageError(cause, f"{CREDENTIALS}; mend them, then repeat the command") from error
            if GONE.search(text):
                raise StorageError(f"there is no bucket {self.bucket}", "create it, then repeat the command") from error
            if isinstance(error, FileNotFoundError) or ("AWS Error" not in text and "google::cloud" not in text):
                raise  # an object that is not there, or a request that pyarrow itself would not make
            raise OSError(errno.EHOSTUNREACH, detail, str(self)) from error


def _copied(read: Callable[[int], bytes], write: Callable[[bytes], object], on_piece: OnPiece = lambda: None) -> str:
    """Copy piece by piece; returns the sha256."""
    digest = hashlib.sha256()
    while piece := read(PIECE_BYTES):
        digest.update(piece)
        write(piece)
        on_piece()
    return digest.hexdigest()


@contextmanager
def _written(file: Path) -> Iterator[Callable[[bytes], object]]:
    """Writes a file of this machine; errors name it, which Python's own do not: the disk that is full is this one, not
    the one that is read."""

    def write(piece: bytes) -> None:
        try:
            target.write(piece)
            target.flush()
        except OSError as error:
            error.filename = str(file)
            raise

    with file.open("wb") as target:
        yield write


@functools.cache
def _system(scheme: str, bucket: str, query: str) -> Any:
    """The file system of a bucket; credentials come from the environment."""
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


@functools.cache
def _resolved(folder: str) -> Path:
    return Path(folder).expanduser().resolve()
