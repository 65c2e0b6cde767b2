"""A real S3 server on loopback (moto), in a process of its own, that keeps everything in memory."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import objects

BUCKET = "runs"
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
Machine = Callable[[str], RunDir]


@dataclass
class Store:
    """The server and access to its objects."""

    port: int
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which qpruner and the tools of AWS reach the server."""
        return KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def uri(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    def client(self, service: str, region: str = "us-east-1") -> Any:
        """Make a boto3 client for the server."""
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": region}
        return boto3.client(service, endpoint_url=f"http://127.0.0.1:{self.port}", **keys)

    def suspend(self) -> None:
        """Suspend the server: it accepts connections, but does not answer."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def read(self, key: str) -> bytes:
        """Read an object in one request, unlike pyarrow."""
        return self.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        with self._system.open_output_stream(f"{BUCKET}/{key}") as stream:
            stream.write(data)

    def damage(self, key: str) -> None:
        """Flip the bits of one byte."""
        data = bytearray(self.read(key))
        data[len(data) // 2] ^= 0xFF
        self.write(key, bytes(data))

    def keys(self, prefix: str) -> dict[str, int]:
        """Return the size of every object under a prefix, by its key after the prefix."""
        from pyarrow.fs import FileSelector

        root = f"{BUCKET}/{prefix}"
        found = self._system.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
        return {each.path[len(root) + 1 :]: each.size for each in found if each.is_file}

    def copy(self, run: str, target: str, parts: Sequence[str]) -> None:
        """Copy the objects of a run whose keys start with one of the names."""
        for key in self.keys(run):
            if key.startswith(tuple(parts)):
                self.write(f"{target}/{key}", self.read(f"{run}/{key}"))

    def delete(self, key: str) -> None:
        self._system.delete_file(f"{BUCKET}/{key}")

    @cached_property
    def _system(self) -> Any:
        from pyarrow.fs import S3FileSystem

        place = {"region": "us-east-1", "endpoint_override": f"http://127.0.0.1:{self.port}"}
        return S3FileSystem(
            access_key="test", secret_key="test", allow_bucket_creation=True, **place
        )


@contextmanager
def object_store(**settings: str) -> Iterator[Store]:
    """Run the server with an empty bucket until the end of the block; settings are environment
    variables."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    store = Store(port, process)
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (
                "the server does not start"
            )
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        store._system.create_dir(BUCKET)
        yield store
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def store() -> Iterator[Store]:
    with object_store() as found:
        yield found


@pytest.fixture
def machine(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a function that switches to a machine of some name, with its own cache.

    The function returns the run of the test there.
    """
    talk_to(store, monkeypatch)

    def go(name: str) -> RunDir:
        monkeypatch.setenv(objects.CACHE, str(tmp_path / name))
        return RunDir(store.uri(f"{tmp_path.name}/run"))

    return go


@pytest.fixture(params=["folder", "uri"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    """An empty run: once in a folder, and once at a URI."""
    return (
        request.getfixturevalue("machine")("first")
        if request.param == "uri"
        else RunDir(tmp_path / "run")
    )


def talk_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process use a server, and not that of an earlier test."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    objects.open_bucket.cache_clear()


class Gate:
    """A proxy for a server on loopback that can be shut, which also closes its connections."""

    def __init__(self, port: int) -> None:
        self._server = port
        self._open: list[socket.socket] = []
        self.port = free_port()
        self.open()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=True)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self._server))
                self._open += [here, there]
                for ends in ((here, there), (there, here)):
                    threading.Thread(target=_pass_on, args=ends, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
