"""The bank stage: built once, mended file by file, refused when it is somebody else's or finds no room."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import flip_a_byte, raw_config, with_key

from qpruner.config.load import validate_config
from qpruner.errors import StageError
from qpruner.pipeline.run import run
from qpruner.quantization.bank import INDEX, read_index
from qpruner.runs.events import Event, Message, Progress, StageFinished, StageSkipped, StageStarted
from qpruner.runs.records import BankRecord
from qpruner.runs.storage import file_digest, folder_digests

Raw = dict[str, Any]


def bank_of(raw: Raw) -> tuple[BankRecord, list[Event]]:
    """Run as far as the bank."""
    events: list[Event] = []
    record = run(validate_config(raw), events.append, until="bank").bank
    assert record is not None
    return record, events


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    root = tmp_path_factory.mktemp("banked") / "run"
    bank_of(raw_config(tiny_model, root))
    return root


@pytest.fixture
def raw(finished: Path, tiny_raw: Raw) -> Raw:
    """A configuration whose run folder has the whole bank."""
    shutil.copytree(finished, tiny_raw["output"])
    return tiny_raw


def built(events: list[Event]) -> list[str]:
    """Groups that were built."""
    return [event.detail for event in events if isinstance(event, Progress) and event.stage == "bank"]


def said(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Message) and event.stage == "bank")


def test_a_whole_bank_is_skipped(raw: Raw) -> None:
    _, events = bank_of(raw)
    assert "bank" in [event.stage for event in events if isinstance(event, StageSkipped)]
    assert built(events) == []


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_file_is_named_and_it_alone_is_built_again(raw: Raw, damage: str) -> None:
    folder = Path(raw["output"]) / "bank"
    whole = {path: file_digest(path) for path in folder.rglob("*.safetensors")}
    path = folder / "4bit" / "layers.1.down.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)
    record, events = bank_of(raw)
    assert str(path) in said(events)
    assert built(events) == ["layers.1.down"]
    assert {path: file_digest(path) for path in folder.rglob("*.safetensors")} == whole
    assert set(record.files.values()) == set(whole.values())


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)], ids=["missing", "cut"])
def test_an_index_that_cannot_be_read_is_named_and_made_again_from_the_record(
    raw: Raw, damage: Callable[[Path], object]
) -> None:
    """It costs no entry, except those that are damaged, too."""
    folder = Path(raw["output"]) / "bank"
    index, whole = read_index(folder), folder_digests(folder / "4bit")
    damage(folder / INDEX)
    _, events = bank_of(raw)
    assert str(folder) in said(events) and INDEX in said(events)
    assert "bank" in [event.stage for event in events if isinstance(event, StageSkipped)]
    assert read_index(folder) == index
    damage(folder / INDEX)
    flip_a_byte(folder / "4bit" / "layers.1.down.safetensors")
    _, events = bank_of(raw)
    assert built(events) == ["layers.1.down"]
    assert read_index(folder) == index and folder_digests(folder / "4bit") == whole


def test_a_bit_width_more_adds_files_and_builds_none_anew(tiny_model: Path, tmp_path: Path) -> None:
    raw = with_key(raw_config(tiny_model, tmp_path / "run"), "quantize.bits", [4, 16])
    bank_of(raw)
    places = {path.name: path.stat().st_ino for path in (tmp_path / "run" / "bank" / "4bit").iterdir()}
    record, _ = bank_of(with_key(raw, "quantize.bits", [4, 8, 16]))
    assert {path.name: path.stat().st_ino for path in (tmp_path / "run" / "bank" / "4bit").iterdir()} == places
    assert len(record.files) == 2 * len(places)


def interrupt(raw: Raw, num_groups: int) -> list[Event]:
    """Build so many groups, then Ctrl-C; what it leaves is what a SIGKILL leaves."""
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if len(built(events)) == num_groups:
            raise KeyboardInterrupt  # the signal itself is ignored where tests run in the background

    with pytest.raises(KeyboardInterrupt):
        run(validate_config(raw), emit, until="bank")
    return events


def test_groups_that_an_interrupted_command_built_are_not_built_again(finished: Path, tiny_raw: Raw) -> None:
    """Except those whose files are damaged meanwhile."""
    first = interrupt(tiny_raw, 3)
    flip_a_byte(Path(tiny_raw["output"]) / ".scratch-bank" / "8bit" / f"{built(first)[1]}.safetensors")
    _, events = bank_of(tiny_raw)
    assert set(built(first)) & set(built(events)) == {built(first)[1]}
    assert len({*built(first), *built(events)}) == 8
    assert read_index(Path(tiny_raw["output"]) / "bank").files == read_index(finished / "bank").files


def test_what_an_interrupted_command_left_for_another_bank_harms_none(raw: Raw) -> None:
    """What it linked lies in the bank, too."""
    raw = with_key(raw, "quantize.bits", [4, 16])
    record, _ = bank_of(raw)
    interrupt(with_key(raw, "quantize.bits", [4, 8, 16]), 1)
    other = with_key(raw, "lora.rank", 2)
    first = interrupt(other, 2)
    again, events = bank_of(raw)
    assert built(events) == [] and "damaged" not in said(events)
    assert again == record
    record, events = bank_of(other)
    assert not set(built(first)) & set(built(events))
    assert set(folder_digests(Path(raw["output"]) / "bank")) == {*record.files, INDEX}


def test_nothing_is_taken_over_from_other_weights(raw: Raw) -> None:
    before, _ = bank_of(raw)
    after, events = bank_of(with_key(raw, "prune.rate", 0.3))
    name = "4bit/layers.0.down.safetensors"
    assert before.files[name] != after.files[name]
    assert len(built(events)) == 8


def test_a_bank_of_another_run_is_refused(raw: Raw, tiny_model: Path, tmp_path: Path) -> None:
    """Copied by hand: every file is whole, and made from other weights."""
    other = with_key(raw_config(tiny_model, tmp_path / "other"), "prune.rate", 0.3)
    bank_of(other)
    folder = Path(raw["output"]) / "bank"
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "other" / "bank", folder)
    with pytest.raises(StageError, match="built for other weights, settings or versions") as caught:
        bank_of(raw)
    assert str(folder) in caught.value.cause
    assert "delete that folder" in caught.value.remedy


@pytest.mark.slow
def test_workers_build_what_this_process_builds(
    raw: Raw, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = bank_of(raw)
    monkeypatch.setattr("qpruner.quantization.bank.FEW_WEIGHTS", 0)
    with_workers, events = bank_of(raw_config(tiny_model, tmp_path / "workers"))
    assert with_workers.files == here.files
    assert with_workers.residual_ratio == here.residual_ratio
    assert sorted(built(events)) == sorted({Path(name).stem for name in here.files})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for the checkpoints and too little for the bank."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_its_bytes_are_told_first_and_a_disk_that_has_filled_up_is_refused(tiny_model: Path, small_disk: Path) -> None:
    """There was room when the run began; somebody else's file took it while the model was cut."""
    raw = raw_config(tiny_model, small_disk / "run")
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, StageFinished) and event.stage == "prune":
            (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 60_000))

    with pytest.raises(StageError, match="no space left for the bank") as caught:
        run(validate_config(raw), emit, until="bank")
    assert "16 entries to build" in said(events)
    assert "make room" in caught.value.remedy
    assert not list(small_disk.rglob("*bit/*.safetensors"))


@pytest.mark.slow
def test_a_file_damaged_under_a_search_stops_it_and_is_all_that_is_mended(raw: Raw) -> None:
    """A disk flips a byte after the bank was checked: the trials that meet it say nothing of their plans."""
    raw = with_key(with_key(raw, "search.max_trials", 3), "sensitivity.methods", ["mutual_information"])
    path = Path(raw["output"]) / "bank" / "4bit" / "layers.1.down.safetensors"

    def flip(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "search":
            data = bytearray(path.read_bytes())
            data[-7] ^= 1
            path.write_bytes(data)

    with pytest.raises(StageError, match="damaged") as caught:
        run(validate_config(raw), flip, until="search")
    assert str(path) in caught.value.cause
    assert "repeat the command" in caught.value.remedy
    events: list[Event] = []
    searched = run(validate_config(raw), events.append, until="search").search
    assert searched is not None
    assert built(events) == ["layers.1.down"]
    assert (searched.num_trials, searched.num_failed) == (3, 0)
