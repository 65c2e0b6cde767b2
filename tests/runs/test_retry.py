"""A full or missing storage is waited for, then reported with the remedy; written files stay
complete."""

import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from conftest import away, full, full_until_noticed, run_program
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from qpruner.cluster.node_check import check_node, versions
from qpruner.data.encoding import load_encoded, save_encoded
from qpruner.errors import StorageError
from qpruner.runs.records import SearchClock
from qpruner.runs.storage import (
    exists,
    files_in,
    folder_digests,
    read_existing,
    read_json,
    remove,
    require_arrived,
    retry_storage,
    storage_at,
    storage_error,
    write_json,
    writing_folder,
)


def test_files_that_a_trial_reads_first_are_waited_for(disk: Path) -> None:
    """These are the id of the run and the rows."""
    (disk / "run").mkdir()
    (disk / "run" / "run.id").write_text("this run")
    save_encoded([{"input_ids": [1], "labels": [1]}], disk / "rows")
    storage = (str(disk / "run"), "the run", "run.id", "this run")
    for place, read in (
        (disk / "run", lambda: check_node(versions(), storage)),
        (disk / "rows", lambda: load_encoded(disk / "rows")),
    ):
        with away(place) as end:  # type: ignore[attr-defined]
            threading.Timer(0.3, end).start()
            read()  # raises unless it waits


def test_pauses_end_but_restart_if_an_attempt_continues(disk: Path) -> None:
    """Each attempt takes longer than all pauses together, as for a large model; a resumable one
    makes progress."""
    attempts = 0

    def write() -> None:
        nonlocal attempts
        attempts += 1
        time.sleep(0.12)
        if attempts == 3:
            raise InterruptedError
        (disk / "copy").write_bytes(b"c" * 10_000)

    with full(disk):  # type: ignore[attr-defined]
        with pytest.raises(StorageError, match="no space left"):
            retry_storage(write, disk, seconds=0.1)
        assert attempts == 2
        attempts = 0
        with pytest.raises(InterruptedError):
            retry_storage(write, disk, seconds=0.1, resumable=True)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (full, r"no space left for {}\n.*make room"),
        (away, r"cannot be reached \(Read-only.*\n.*bring the storage back"),
    ],
)
def test_a_full_or_missing_storage_is_reported_or_waited_for(
    trouble: Callable[..., Iterator[None]], message: str, disk: Path
) -> None:
    path = disk / "trials" / "record.json"
    write_json(path, SearchClock(seconds=1.0))
    assert exists(path)
    assert not exists(disk / "nothing")
    assert not exists(path / "nothing")
    assert not exists(disk)
    with trouble(disk) as end:  # type: ignore[attr-defined]
        with pytest.raises(StorageError, match=message.format(path)) as caught:
            write_json(path, SearchClock(seconds=2.0), patience_seconds=0.4)
        assert caught.value.exit_code == 1
        started = time.monotonic()
        threading.Timer(0.8, end).start()
        # What was written is waited for.
        assert read_existing(path, SearchClock) == SearchClock(seconds=1.0)
        write_json(path, SearchClock(seconds=2.0), patience_seconds=20)
        assert time.monotonic() - started > 0.7
    assert read_json(path, SearchClock) == SearchClock(seconds=2.0)


@contextmanager
def lost_answer(number: int, nth: int = 1) -> Iterator[None]:
    """Raise an error after a rename that succeeded: EIO from a lost server, or ENOENT from a
    repeated request."""
    renames = 0

    def on_call(frame: FrameType, event: str, function: object) -> None:
        nonlocal renames
        if event == "c_return" and function in (os.rename, os.replace):
            renames += 1
            if renames == nth:
                raise OSError(number, os.strerror(number))  # this also turns the profiler off

    sys.setprofile(on_call)
    try:
        yield
    finally:
        sys.setprofile(None)
    assert renames >= nth


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT], ids=["EIO", "ENOENT"])
@pytest.mark.parametrize("renamed", [1, 2], ids=["folder", "list"])
def test_a_rename_without_an_answer_is_noticed(renamed: int, number: int, tmp_path: Path) -> None:
    """The record and the folder are written; the folder is the only copy of hours of work."""
    path = tmp_path / "record.json"
    scratch = tmp_path / "scratch"
    target = tmp_path / "prune"
    write_json(path, SearchClock(seconds=1.0))
    with lost_answer(number):
        write_json(path, SearchClock(seconds=2.0))
    assert read_json(path, SearchClock) == SearchClock(seconds=2.0)
    assert list(tmp_path.iterdir()) == [path]
    with writing_folder(scratch) as folder:
        folder.mkdir()
        (folder / "weights").write_text("hours")
    target.mkdir()
    (target / "unfinished").write_text("half")
    with lost_answer(number, renamed):
        storage_at(target).publish(scratch)
    assert folder_digests(tmp_path).keys() == {"record.json", "prune/weights", "prune.files.json"}
    storage_at(target).verify()


TENSOR = {"weight": torch.zeros(50_000)}
SAVES: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file(TENSOR, path),
    "torch": lambda path: torch.save(TENSOR, path),
    # shutil collects the errors of its copies in one error without errno.
    "shutil": lambda path: shutil.copytree(
        path.parents[1] / "checkpoint", path, dirs_exist_ok=True
    ),
    "tokenizers": lambda path: Tokenizer(
        BPE({f"word {number}": number for number in range(10_000)}, [])
    ).save(str(path)),
}


@pytest.mark.parametrize("library", SAVES)
@pytest.mark.parametrize("leave", [0, 8192])
def test_a_full_disk_that_a_library_reports_is_waited_for(
    library: str, leave: int, disk: Path
) -> None:
    path = disk / "saved"
    (disk.parent / "checkpoint").mkdir()
    (disk.parent / "checkpoint" / "weights").write_bytes(b"w" * 150_000)
    with full_until_noticed(disk, leave) as filler:
        retry_storage(lambda: SAVES[library](path), path, seconds=2)
        assert not filler.exists()
    assert sum(files_in(disk).values()) > 100_000
    remove(path)
    with full(disk), pytest.raises(StorageError, match=rf"no space left for {path}\n.*make room"):
        retry_storage(lambda: SAVES[library](path), path, seconds=0)


def test_another_error_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        retry_storage(lambda: (tmp_path / "nothing").read_text(), tmp_path)
    assert storage_error(caught.value) is None


def test_a_folder_missing_on_this_machine_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=r"was written on another machine and is missing here\n.*share `output`"
    ):
        require_arrived(tmp_path / "prune")


def test_a_storage_is_waited_for_two_minutes_unless_told_otherwise() -> None:
    code = "from qpruner.runs.storage.retry import PATIENCE_SECONDS; print(PATIENCE_SECONDS)"
    environment = {name: value for name, value in os.environ.items() if "PATIENCE" not in name}
    done = run_program(sys.executable, "-c", code, environment=environment)
    assert done.stdout.strip() == "120.0"
