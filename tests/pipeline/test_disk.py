"""Room on a real file system: what is asked of it is what the run has still to write."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import disk_of, with_key

from qpruner.config.load import validate_config
from qpruner.errors import UserError
from qpruner.pipeline.run import check, run
from qpruner.runs.events import Event

MIB = 2**20


def ignore(event: Event) -> None:
    """Nobody listens."""


@pytest.fixture
def raw(tmp_path: Path, tiny_raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A run on a disk of its own."""
    with disk_of("48m", tmp_path / "disk") as disk:
        yield with_key(tiny_raw, "output", str(disk / "run"))


@contextmanager
def with_free(raw: dict[str, Any], num_bytes: int) -> Iterator[None]:
    """Have so much room on the run's disk, and no more."""
    disk = Path(raw["output"]).parent
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - num_bytes)
    yield
    filler.unlink()


def needed(raw: dict[str, Any]) -> int:
    """Bytes that the refusal of a full disk names."""
    with with_free(raw, 8192), pytest.raises(UserError) as caught:
        check(validate_config(raw), ignore)
    found = re.search(r"needs about ([\d.]+) MiB more in .*make room", str(caught.value))
    assert found, str(caught.value)
    return round(float(found[1]) * MIB)


def test_what_a_run_holds_already_is_paid_for(raw: dict[str, Any]) -> None:
    """The disk took the first half of the run: it takes the rest, though it never again has room for the whole."""
    whole = needed(raw)
    run(validate_config(raw), ignore, until="bank")
    written = sum(path.stat().st_size for path in Path(raw["output"], "bank").rglob("*.safetensors"))
    left = needed(raw)
    assert left < whole - written
    with with_free(raw, left + MIB // 10):
        check(validate_config(raw), ignore)
        run(validate_config(raw), ignore, until="bank")
    other = with_key(raw, "prune.rate", 0.3)
    assert needed(other) > left + written // 2, "of another model nothing is there"


def test_what_a_killed_stage_left_is_paid_for(raw: dict[str, Any]) -> None:
    """The stage begins with an empty folder again."""
    run(validate_config(raw), ignore, until="prepare")
    left = needed(raw)
    half_written = Path(raw["output"], ".scratch-prune", "model.safetensors")
    half_written.parent.mkdir()
    half_written.write_bytes(b"\0" * (MIB // 4))
    assert needed(raw) < left - MIB // 8
