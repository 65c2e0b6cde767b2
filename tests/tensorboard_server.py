"""Run the real TensorBoard."""

import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from object_store import free_port


@contextmanager
def serving(
    command: Sequence[str],
    awaited: str,
    working_folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Start TensorBoard on loopback; yield its address once it lists the awaited run."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [*command, "--host=127.0.0.1", f"--port={port}"],
        cwd=working_folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                if (
                    awaited
                    in urllib.request.urlopen(f"{address}/data/runs", timeout=10).read().decode()
                ):
                    break
            except OSError:
                pass
            assert server.poll() is None and time.monotonic() < deadline, (
                "TensorBoard does not answer"
            )
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)
