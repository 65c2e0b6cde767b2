"""Free room on a real file system: a run needs room only for files that it has not written yet."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ignore, with_key

from qpruner.config.load import validate_config
from qpruner.errors import UserError
from qpruner.pipeline.run import check, run

MIB = 2**20


@pytest.fixture
def raw(disk: Path, tiny_raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose run folder is on a small disk."""
    return with_key(tiny_raw, "output", str(disk / "run"))


@contextmanager
def with_free(raw: dict[str, Any], num_bytes: int) -> Iterator[None]:
    """Fill the disk except for this many bytes."""
    disk = Path(raw["output"]).parent
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - num_bytes)
    yield
    filler.unlink()


def needed(raw: dict[str, Any]) -> int:
    """Return the needed bytes in the error about a full disk."""
    with with_free(raw, 8192), pytest.raises(UserError) as caught:
        check(validate_config(raw), ignore)
    found = re.search(r"needs about ([\d.]+) MiB more in .*make room", str(caught.value))
    assert found, str(caught.value)
    return round(float(found[1]) * MIB)


def test_files_of_finished_stages_need_no_more_room(raw: dict[str, Any]) -> None:
    """A disk that is too small for a second copy of the run is large enough to finish the run."""
    whole = needed(raw)
    run(validate_config(raw), ignore, until="bank")
    written = sum(
        path.stat().st_size for path in Path(raw["output"], "banks").rglob("*.safetensors")
    )
    left = needed(raw)
    assert left < whole - written
    with with_free(raw, left + MIB // 10):
        check(validate_config(raw), ignore)
        run(validate_config(raw), ignore, until="bank")
    other = with_key(raw, "prune.rate", 0.3)
    assert needed(other) > left, "another model needs room until it replaces this one"


def test_the_scratch_folder_of_a_killed_stage_counts_as_room(raw: dict[str, Any]) -> None:
    """The next command empties the scratch folder."""
    run(validate_config(raw), ignore, until="prepare")
    left = needed(raw)
    half_written = Path(raw["output"], ".scratch-prune", "model.safetensors")
    half_written.parent.mkdir()
    half_written.write_bytes(b"\0" * (MIB // 4))
    assert needed(raw) < left - MIB // 8
