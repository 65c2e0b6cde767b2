"""Records and folders of a run, in a folder and at a URI, are complete even if their writer is
killed (SIGKILL)."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

import pytest
import torch
from made_records import made_fine_tune
from safetensors.torch import save_file

from qpruner.errors import CorruptFile
from qpruner.runs.records import BankRecord, FineTune, PrepareRecord, SearchClock
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import (
    OWN_DIGEST,
    children,
    exists,
    fetch,
    file_digest,
    files_in,
    folder_digests,
    published_folders,
    quarantine,
    read_json,
    remove,
    storage_at,
    working_folder,
    write_json,
    writing_folder,
)

WRITE_FOR_EVER = """
import itertools, sys
from qpruner.runs.records import BankRecord
from qpruner.runs.run_dir import RunDir
run = RunDir(sys.argv[1])
for turn in itertools.count():
    files = dict.fromkeys(map(str, range(400 * (turn % 2))), str(turn))
    record = BankRecord(
        digest=str(turn), seconds=1.0, files=files, bytes=turn, residual_ratio={}
    )
    run.write_record("bank", record)
    if turn % 3 == 0:
        print(turn, flush=True)
"""
COMMIT_FOR_EVER = """
import itertools, sys
from qpruner.runs.records import BankRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import file_digest
run = RunDir(sys.argv[1])
for turn in itertools.count(int(sys.argv[2])):
    scratch = run.begin("bank")
    files = {}
    for index in range(12):
        path = scratch / "4bit" / f"layers.{index}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{turn} {index} " * 500)
        files[str(path.relative_to(scratch))] = file_digest(path)
    record = BankRecord(digest=str(turn), seconds=1.0, files=files, bytes=turn, residual_ratio={})
    run.commit("bank", scratch, record)
    print(turn, flush=True)
"""


def bank_record(digest: str = "a") -> BankRecord:
    return BankRecord(
        digest=digest, seconds=1.5, files={}, bytes=10, residual_ratio={"4": {"layers.0": 0.5}}
    )


def folder_of(tmp_path: Path, **files: str) -> Path:
    """Make a folder with the given files; `a__b` stands for `a/b`."""
    folder = tmp_path / "made"
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@contextmanager
def writer(program: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Start a process that writes until it is killed, and prints a line after each step."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline()
            yield process, process.stdout
        finally:
            process.kill()


def kill_within_a_write(
    process: subprocess.Popen[str], lines: IO[str], generator: random.Random
) -> None:
    for _ in range(generator.randrange(1, 4)):
        assert lines.readline()
    time.sleep(generator.uniform(0.0, 0.006))
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_killed_writer_leaves_the_old_record_or_the_new(run_dir: RunDir) -> None:
    """A reader never sees a part of one: the terminal, `qpruner status` and other nodes read at any
    time."""
    generator = random.Random(0)
    digests = set()

    def look(turn: int) -> None:
        record = run_dir.read_record("bank", BankRecord)
        assert len(record.files) == 400 * (record.bytes % 2)
        assert set(record.files.values()) <= {record.digest}
        digests.add(f"{turn} {record.digest}")

    assert run_dir.read_record("bank", BankRecord) is None
    for turn in (1, 2):
        with writer(WRITE_FOR_EVER, run_dir.place) as (process, lines):
            while len(digests) < 20 * turn:
                look(turn)
            kill_within_a_write(process, lines, generator)
        look(turn)
    run_dir.write_record("bank", bank_record("after"))
    assert run_dir.read_record("bank", BankRecord) == bank_record("after")
    assert exists(run_dir.record_path("bank"))
    assert "bank.json" in children(run_dir.root / "records")
    run_dir.forget("bank")
    assert run_dir.read_record("bank", BankRecord) is None
    assert not exists(run_dir.record_path("bank"))


def test_files_of_a_killed_stage_are_complete_or_unrecorded(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a" / "run")
    generator = random.Random(1)
    for turn in range(4):
        with writer(COMMIT_FOR_EVER, str(run.root), str(1000 * turn)) as (process, lines):
            kill_within_a_write(process, lines, generator)
        record = run.read_record("bank", BankRecord)
        if record is not None:
            assert len(record.files) == 12
            assert folder_digests(run.stage("bank")) == record.files


@pytest.mark.parametrize(
    "content",
    [
        b'{"digest": "a", "seco',
        b"\x00" * 200,
        b"\xff\xfe\x80\x81 not utf-8",
        b"[]",
        b'{"digest": "a"}',
    ],
    ids=["cut", "zeros", "binary", "list", "own-digest-missing"],
)
def test_a_corrupt_record_is_named(run_dir: RunDir, content: bytes) -> None:
    """As after a full disk or a power failure; the stage then runs again instead of failing with a
    traceback."""
    storage_at(run_dir.record_path("prepare")).write(content)
    with pytest.raises(
        CorruptFile, match=f"{run_dir.place}/records/prepare.json is not a PrepareRecord"
    ):
        run_dir.read_record("prepare", PrepareRecord)


def test_a_score_without_standard_error_can_be_read(tmp_path: Path) -> None:
    """It is NaN for a single question; an unreadable record would make its stage run again each
    time."""
    plan = {"layers.0": "nf4"}
    record = made_fine_tune("gp", plan, accuracy=0.5, accuracy_stderr=math.nan)
    write_json(tmp_path / "record.json", record)
    assert "NaN" in (tmp_path / "record.json").read_text()
    assert OWN_DIGEST in (tmp_path / "record.json").read_text()
    again = read_json(tmp_path / "record.json", FineTune)
    assert again.model_dump_json() == record.model_dump_json()


def test_a_second_commit_replaces_the_first(run_dir: RunDir, tmp_path: Path) -> None:
    for name in ("old", "new"):
        written = folder_of(tmp_path, **{name: "1", "same": name})
        run_dir.commit("prune", written, bank_record(name))
        assert not written.exists()
        assert (fetch(run_dir.stage("prune")) / "same").read_text() == name
    assert files_in(run_dir.stage("prune")) == {"new": 1, "same": 3}
    assert run_dir.read_record("prune", BankRecord) == bank_record("new")


def test_folders_are_listed_moved_and_removed(run_dir: RunDir, tmp_path: Path) -> None:
    place = run_dir.trials / "d"
    trial = place / "0001"
    write_json(trial / "trial.json", SearchClock(seconds=1.0))
    storage_at(trial / "checkpoint-4").publish(folder_of(tmp_path, adapter="a", state="ss"))
    assert children(place) == ["0001"]
    assert children(run_dir.trials / "none") == []
    assert published_folders(trial) == [trial / "checkpoint-4"]
    digests = folder_digests(trial / "checkpoint-4")
    assert digests == {
        name: file_digest(trial / "checkpoint-4" / name) for name in ("adapter", "state")
    }
    aside = place / "damaged" / Path(quarantine(trial / "checkpoint-4", place)).name
    assert folder_digests(aside) == digests
    assert folder_digests(trial / "checkpoint-4") == {}
    assert (fetch(aside) / "state").read_text() == "ss"
    for _ in range(2):
        remove(trial)
        assert read_json(trial / "trial.json", SearchClock) is None
        assert published_folders(trial) == []
    with pytest.raises(FileNotFoundError):
        file_digest(trial / "trial.json")


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Yield the list of system calls in the block: `rename`, and `fsync PATH` for open files below
    a folder."""
    calls = []

    def on_call(frame: FrameType, event: str, function: object) -> None:
        if event == "c_call" and function in (os.rename, os.replace):
            calls.append("rename")
        elif event == "c_call" and function is os.fsync:
            for descriptor in Path("/proc/self/fd").iterdir():
                with suppress(OSError):
                    path = descriptor.readlink()
                    calls.extend(
                        [f"fsync {path.relative_to(folder)}"] if path.is_relative_to(folder) else []
                    )

    sys.setprofile(on_call)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def test_files_are_flushed_before_they_get_their_name(tmp_path: Path) -> None:
    """Otherwise a power failure may leave the name without the contents; this includes the list of
    a folder."""
    with watched(tmp_path) as calls:
        write_json(tmp_path / "records" / "bank.json", bank_record())
    written, *others = calls
    assert written.startswith("fsync records/.bank.json.")
    assert others == ["rename", "fsync records"]
    with writing_folder(tmp_path / "scratch") as folder:
        (folder / "4bit").mkdir(parents=True)
        (folder / "4bit" / "layers.0").write_text("codes")
    with watched(tmp_path) as calls:
        storage_at(tmp_path / "bank").publish(tmp_path / "scratch")
    assert calls[:3] == ["fsync scratch", "fsync scratch/4bit", "fsync scratch/4bit/layers.0"]
    assert calls[3:] == ["fsync scratch.files.json", "rename", "rename", "fsync ."]
    with watched(
        tmp_path
    ) as calls:  # a checkpoint of a fine-tune, after which the one before is removed
        storage_at(tmp_path / "bank").put_folder(tmp_path / "bank")
    files = ["fsync bank", "fsync bank/4bit", "fsync bank/4bit/layers.0", "fsync bank.files.json"]
    assert calls == [*files, "fsync ."]


def test_files_get_the_read_permissions_of_their_folder(tmp_path: Path) -> None:
    """safetensors makes files readable for the owner only, but a team shares a run."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o755)
    save_file({"weight": torch.ones(2)}, scratch / "model.safetensors")
    storage_at(tmp_path / "final").publish(scratch)
    assert (tmp_path / "final" / "model.safetensors").stat().st_mode & 0o777 == 0o644


PREFIX = "qpruner-test-"
HOLD = f"""
import sys
from qpruner.runs.storage import working_folder
with working_folder({PREFIX!r}) as folder:
    (folder / "rung").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_killed_processes_leave_no_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process deletes it, but keeps folders in use and those of other users."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    foreign = tmp_path / f"{PREFIX}foreign"
    foreign.mkdir()
    lock = tmp_path / f".{foreign.name}.lock"
    lock.touch()
    os.chown(lock, 12345, -1)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as process:
        theirs = Path(process.stdout.readline().decode().strip())
        with working_folder(PREFIX) as first, working_folder(PREFIX) as second:
            assert (theirs / "rung").is_dir()
            assert first.is_dir()
            assert second.is_dir()
            assert first.stat().st_mode & 0o777 == 0o700
        process.kill()
        process.wait()
    assert (theirs / "rung").is_dir()
    with working_folder(PREFIX) as ours:
        assert {path for path in tmp_path.iterdir() if path.is_dir()} == {ours, foreign}
    assert set(tmp_path.iterdir()) == {foreign, lock}
