"""Buckets: URIs of runs and the folders that stand for them, credentials, and pyarrow's file systems and errors."""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from qpruner.errors import StorageError, UserError

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


def cache_root() -> Path:
    """Where this machine keeps what it fetched; it may be deleted while no command runs."""
    return _resolved(os.environ.get(CACHE, "~/.cache/qpruner"))


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


@contextmanager
def translated(name: str, bucket: str) -> Iterator[None]:
    """Raise pyarrow's errors, which tell their kind in their text only, as errors of files."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and "google::cloud" not in str(error):
            raise
        text = re.sub(r"\s*(\(Request ID|error_info=).*", "", str(error), flags=re.DOTALL).strip()
        if text.startswith(os.strerror(errno.ENOENT)):  # without its number: of a folder at Google's
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error
        detail = text.partition("AWS Error ")[2] or text
        if REFUSED.search(detail):
            cause = f"{name}: access is refused ({detail})"
            raise StorageError(cause, f"{CREDENTIALS}; mend them, then repeat the command") from error
        if GONE.search(text):
            raise StorageError(f"there is no bucket {bucket}", "create it, then repeat the command") from error
        if isinstance(error, FileNotFoundError) or ("AWS Error" not in text and "google::cloud" not in text):
            raise  # an object that is not there, or a request that pyarrow itself would not make
        raise OSError(errno.EHOSTUNREACH, detail, name) from error


@functools.cache
def _resolved(folder: str) -> Path:
    return Path(folder).expanduser().resolve()
