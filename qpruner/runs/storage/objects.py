"""The storage of a run in an object store (`s3://`, `gs://`), through pyarrow.

Each machine has a mirror of the run, a folder for local copies whose path contains the URI. The
files of a folder are uploaded before its file list: a folder without a list does not exist.
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
from urllib.request import getproxies, proxy_bypass

from qpruner.errors import CorruptFile, StorageError, UserError
from qpruner.runs.storage import base
from qpruner.runs.storage.base import FILES, FileList, OnPiece, Stat, Storage, for_each, list_path
from qpruner.runs.storage.retry import retry_storage

CACHE = "QPRUNER_CACHE"
"""Environment variable with the folder of this machine for mirrors of runs.

Without it, the folder is `~/.cache/qpruner`.
"""
# These limits end an unanswered request after about ten seconds; `retry_storage` may repeat it.
CONNECT_SECONDS = 5.0
QUIET_SECONDS = 5.0
ATTEMPTS = 2
REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|TOKEN|HTTP status 40[13]"
    r"|UNAUTHENT|PERMISSION_DENIED"
)
GONE = re.compile(r"NO_SUCH_BUCKET|[Bb]ucket '[^']*' not found|specified bucket does not exist")
CREDENTIALS = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "AWS_PROFILE or the machine's role; GOOGLE_APPLICATION_CREDENTIALS for gs://), on every machine"
)
OPTIONS = ("scheme", "endpoint_override", "region")
"""Options that the URI of a run may have."""
logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the folder for local copies on this machine.

    It may be deleted while no command runs.
    """
    return Path(os.environ.get(CACHE, "~/.cache/qpruner")).expanduser().resolve()


def mirror_of(uri: str) -> Path:
    """Return the path of the mirror for the URI of a run.

    Raises:
        UserError: If the URI is invalid.
    """
    form = "must be a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
    try:
        parts = urlsplit(uri)
    except ValueError:  # an invalid address in brackets; the text of the error may contain a key
        raise UserError(f"`output` {form}") from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    # Messages must not repeat keys. A key may contain a slash, and then only its start is in
    # `netloc`.
    if any(sign in parts.netloc for sign in "@:") or "@" in "".join(options.values()):
        raise UserError(f"`output`: a URI must not contain credentials; {CREDENTIALS}")
    has_unknown = any(name not in OPTIONS for name in options)
    if has_unknown or options.get("scheme", "https") not in ("http", "https"):
        raise UserError(
            "`output`: a URI takes no options but endpoint_override, region, "
            "and scheme (http or https)"
        )

    prefix = parts.path.strip("/")
    steps = (parts.netloc, *prefix.split("/"))
    is_folder = all(step not in ("", ".", "..") for step in steps)
    if parts.scheme not in ("s3", "gs") or parts.fragment or not is_folder:
        raise UserError(f"`output`: {uri} {form}")

    query = f"?{parts.query}" if parts.query else ""
    name = quote(f"{parts.scheme}://{parts.netloc}/{prefix}{query}", safe="")
    if len(name) > 255:
        raise UserError(
            f"`output`: {uri} must be shorter: as a folder name it has {len(name)} characters, "
            "at most 255"
        )
    return cache_root() / "runs" / name


def objects_at(path: Path) -> ObjectStorage | None:
    """Return the objects that a path in a mirror stands for; None for any other path.

    A mirror is the local copy of a run in an object store.
    """
    return ObjectStorage(path) if cache_root() / "runs" in path.parents else None


@functools.cache
def open_bucket(scheme: str, bucket: str, query: str) -> Any:
    """Open the file system of a bucket, with the credentials of the environment."""
    from pyarrow import fs

    options: dict[str, Any] = dict(parse_qsl(query))
    if scheme == "gs":
        options.pop("region", None)
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=3 * QUIET_SECONDS), **options)
    # pyarrow 26 reads these variables only in `from_uri`, which cannot set time limits.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = options.setdefault("endpoint_override", endpoint)
    region = options.setdefault("region", region)
    of_region = f"s3.{region}" if region else "s3"
    host = endpoint or f"{bucket}.{of_region}.amazonaws.com"
    proxy = _proxy_for(host, options.get("scheme", "https"))
    if not (endpoint or region):
        if proxy:
            raise UserError(
                f"`output`: the region of {bucket} cannot be asked for through the proxy of "
                "HTTPS_PROXY: set AWS_REGION"
            )
        options["region"] = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        proxy_options=proxy,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=QUIET_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        # A small object is then uploaded in one request, so never in part.
        allow_delayed_open=True,
        background_writes=False,
        **options,
    )


def _proxy_for(endpoint: str, scheme: str) -> str | None:
    """Return the proxy that HTTPS_PROXY or HTTP_PROXY names.

    Return None if there is none, or if NO_PROXY excludes the host of the endpoint. Pyarrow (26)
    does not read these variables for S3.
    """
    parts = urlsplit(endpoint if "://" in endpoint else f"{scheme}://{endpoint}")
    if proxy_bypass(parts.netloc):
        return None
    proxy = getproxies().get(parts.scheme)
    if proxy and "://" not in proxy:
        return f"http://{proxy}"
    return proxy


class ObjectStorage(Storage):
    """The object with a key, or a folder.

    A folder is all objects whose keys begin with that key and a slash.
    """

    fills_this_disk = False
    access_remedy = f"every node must have access to `output`: {CREDENTIALS}"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        uri, *names = path.relative_to(cache_root() / "runs").parts
        parts = urlsplit(unquote(uri))
        self.scheme = parts.scheme
        self.bucket = parts.netloc
        self.query = parts.query
        self.key = "/".join([parts.path.strip("/"), *names])
        self._path = f"{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    @property
    def address(self) -> str:
        return f"{self.name}?{self.query}" if self.query else self.name

    @property
    def staging(self) -> Path:
        return cache_root() / "scratch" / self.path.relative_to(cache_root() / "runs")

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        with self._translated(), self._system.open_input_stream(self._path) as stream:
            yield stream

    def read(self) -> bytes:
        # pyarrow (26) first asks for the size, and then reads so many bytes: only the beginning, if
        # a longer object was uploaded in between.
        while True:
            with self.open() as stream:
                data = bytes(stream.read())
                before = stream.metadata()
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
            info = self._system.get_file_info(self._path)
        if info.type != FileType.File:
            return None
        return Stat(modified=float(info.mtime.timestamp()), size=int(info.size))

    def put(self, file: Path) -> str:
        with (
            file.open("rb") as source,
            self._translated(),
            self._system.open_output_stream(self._path) as stream,
        ):
            return base.copy_pieces(source.read, stream.write)

    def names(self) -> list[str]:
        return sorted(info.base_name for info in self._infos(recursive=False))

    def files(self) -> dict[str, int]:
        return {self._name_of(info): info.size for info in self._infos() if info.is_file}

    def delete(self) -> None:
        file_lists = [self / name for name in self.files() if name.endswith(FILES)]
        for storage in (*file_lists, self.file_list, self):
            storage._delete()
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)
        list_path(self.path).unlink(missing_ok=True)

    def move(self, target: Path) -> None:
        destination = objects_at(target)
        assert destination is not None
        with self._translated():
            for name in self.files():
                self._system.move(f"{self._path}/{name}", f"{destination._path}/{name}")
            if self.stat():
                self._system.move(self._path, destination._path)
            if self.file_list.stat():
                self._system.move(self.file_list._path, destination.file_list._path)

    def put_folder(self, folder: Path) -> FileList:

        def put(name: str) -> str:
            return retry_storage(lambda: (self / name).put(folder / name), self.path / name)

        def delete(name: str) -> None:
            retry_storage((self / name)._delete, self.path / name)

        retry_storage(self.file_list._delete, self.path)
        names = sorted(Storage(folder).files())
        listed = FileList(sha256=dict(zip(names, for_each(put, names), strict=True)))
        retry_storage(lambda: self.file_list.write(listed.model_dump_json().encode()), self.path)
        stale = retry_storage(self.files, self.path).keys() - set(names)
        for_each(delete, sorted(stale))
        return listed

    def publish(self, folder: Path) -> None:
        self.put_folder(folder)
        shutil.rmtree(folder)
        list_path(folder).unlink(missing_ok=True)

    def fetch(self, on_piece: OnPiece = lambda: None) -> None:
        # All processes of a machine share one copy while the list stays the same; each process
        # verifies it once.
        listed = self.read_list()
        if listed is None:
            reason = f"{self.name} is missing or incomplete: there is no {self.file_list.name}"
            raise CorruptFile(reason, self.path)
        if self._has_copy(listed, on_piece):
            return
        with base.exclusive(self.path, on_piece):
            if self._has_copy(listed, on_piece):  # downloaded by another process meanwhile
                return
            folder = base.empty_folder(self.staging)
            self.compare(listed, lambda name: (self / name).download(folder / name, on_piece))
            base.keep_copy(folder, self.path, listed)

    def _has_copy(self, listed: FileList, on_piece: OnPiece) -> bool:
        copy = Storage(self.path)
        try:
            if not self.path.is_dir() or copy.read_list() != listed:
                return False
            copy.fetch(on_piece)
        except CorruptFile as error:
            logger.warning(
                "the copy %s on this machine is damaged; downloading all of %s again",
                error.path,
                self.name,
            )
            list_path(self.path).unlink(missing_ok=True)
            return False
        return True

    def verify(self, on_piece: OnPiece = lambda: None) -> None:
        # Only missing objects, and those changed after the list was uploaded, can differ from it.
        stat = retry_storage(self.file_list.stat, self.path)
        listed = self.read_list()
        if stat is None or listed is None:
            return
        doubtful = dict(listed.sha256)
        for info in retry_storage(self._infos, self.path):
            if info.is_file and info.mtime.timestamp() < stat.modified:
                doubtful.pop(self._name_of(info), None)
        self.compare(FileList(sha256=doubtful), lambda name: (self / name).digest())

    def check_reachable(self) -> None:
        """Raise `UserError` if the store does not answer or refuses access to the objects.

        Access to the bucket itself is not needed.
        """
        try:
            with contextlib.suppress(FileNotFoundError):
                self._infos(recursive=False, must_exist=True)
        except StorageError as error:
            raise UserError(f"`output`: {error.cause}; {error.remedy}") from error
        except OSError as error:
            raise UserError(
                f"`output`: {self.name} cannot be reached ({error.strerror}); check the network "
                "and the endpoint (AWS_ENDPOINT_URL, or ?endpoint_override= in the URI)"
            ) from error

    @property
    def _system(self) -> Any:
        return open_bucket(self.scheme, self.bucket, self.query)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn errors that pyarrow raises inside the block into Python errors.

        They are recognized by their text.
        """
        try:
            yield
        except OSError as error:
            is_of_google = "google::cloud" in str(error)
            if error.errno is not None and not is_of_google:
                raise
            text = re.sub(r"\s*(\(Request ID|error_info=).*", "", str(error), flags=re.DOTALL)
            text = text.strip()
            missing = os.strerror(errno.ENOENT)
            if text.startswith(missing):  # Google Cloud Storage, for a missing folder
                raise FileNotFoundError(errno.ENOENT, missing, self.name) from error

            _, _, of_amazon = text.partition("AWS Error ")
            detail = of_amazon or text
            if REFUSED.search(detail):
                raise StorageError(
                    f"{self.name}: access is refused ({detail})",
                    f"{CREDENTIALS}; correct the credentials, then repeat the command",
                ) from error
            if GONE.search(text):
                raise StorageError(
                    f"there is no bucket {self.bucket}", "create it, then repeat the command"
                ) from error
            if isinstance(error, FileNotFoundError):
                raise  # a missing object
            if "AWS Error" not in text and "google::cloud" not in text:
                raise  # a request that pyarrow itself refused
            raise OSError(errno.EHOSTUNREACH, detail, self.name) from error

    def _delete(self) -> None:
        with self._translated():
            if self.stat():
                self._system.delete_file(self._path)
            else:
                self._system.delete_dir_contents(self._path, missing_dir_ok=True)

    def _name_of(self, info: Any) -> str:
        """Return the name of an object inside this folder."""
        return str(info.path.removeprefix(f"{self._path}/"))

    def _infos(self, recursive: bool = True, must_exist: bool = False) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._translated():
            selector = FileSelector(self._path, allow_not_found=not must_exist, recursive=recursive)
            infos: list[Any] = self._system.get_file_info(selector)
        return infos
