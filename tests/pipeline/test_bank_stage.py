"""The bank stage: damaged and missing files are built again, and files of the same inputs are reused."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import flip_a_byte, ignore, raw_config, with_key, with_keys

from qpruner.config.load import validate_config
from qpruner.errors import StageError
from qpruner.pipeline import preflight
from qpruner.pipeline.bank import Bank, add_entries
from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import controls
from qpruner.pipeline.flow import recorded
from qpruner.pipeline.run import run
from qpruner.quantization.bank import INDEX, read_index
from qpruner.quantization.formats import format_of, formats
from qpruner.runs.events import Event, Message, Progress, StageSkipped, TrialChanged
from qpruner.runs.records import BankRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import file_digest, folder_digests, write_json

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
    """A configuration whose run folder has a finished bank."""
    shutil.copytree(finished, tiny_raw["output"])
    return tiny_raw


def built(events: list[Event]) -> list[str]:
    """List the groups that were built."""
    return [event.detail for event in events if isinstance(event, Progress) and event.stage == "bank"]


def said(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Message) and event.stage == "bank")


def is_skipped(events: list[Event]) -> bool:
    return "bank" in [event.stage for event in events if isinstance(event, StageSkipped)]


def test_only_damaged_and_missing_files_are_built_again(raw: Raw) -> None:
    folder = Path(raw["output"]) / "bank"
    whole = {path: file_digest(path) for path in folder.rglob("*.safetensors")}
    _, events = bank_of(raw)
    assert is_skipped(events) and built(events) == []
    flip_a_byte(flipped := folder / "nf4" / "layers.1.down.safetensors")
    (gone := folder / "int8" / "layers.0.qkv.safetensors").unlink()
    record, events = bank_of(raw)
    assert str(flipped) in said(events) and str(gone) in said(events)
    assert built(events) == ["layers.0.qkv", "layers.1.down"]
    assert {path: file_digest(path) for path in folder.rglob("*.safetensors")} == whole
    assert set(record.files.values()) == set(whole.values())


def test_a_damaged_index_is_made_from_the_record(raw: Raw) -> None:
    folder = Path(raw["output"]) / "bank"
    index, intact = read_index(folder), folder_digests(folder / "nf4")
    os.truncate(folder / INDEX, 100)
    _, events = bank_of(raw)
    assert str(folder / INDEX) in said(events) and is_skipped(events) and read_index(folder) == index
    (folder / INDEX).unlink()
    flip_a_byte(folder / "nf4" / "layers.1.down.safetensors")
    _, events = bank_of(raw)
    assert built(events) == ["layers.1.down"]
    assert read_index(folder) == index and folder_digests(folder / "nf4") == intact


def test_another_format_builds_no_file_anew(tiny_raw: Raw) -> None:
    bank_of(with_key(tiny_raw, "quantize.bits", [4, 16]))
    folder = Path(tiny_raw["output"]) / "bank" / "nf4"
    places = {path.name: path.stat().st_ino for path in folder.iterdir()}
    record, _ = bank_of(with_key(tiny_raw, "quantize.bits", [4, 8, 16]))
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == places
    assert len(record.files) == 2 * len(places)


def places(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_a_new_version_of_a_format_is_packed_anew(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(raw["output"]) / "bank"
    before = places(folder / "nf4")
    monkeypatch.setitem(formats(), "int8", replace(format_of("int8"), version=format_of("int8").version + 1))
    os.truncate(stale := folder / "int8" / "layers.0.down.safetensors", 8)
    index = read_index(folder)  # as if this version had packed other bytes
    entry = index.files["int8/layers.0.down.safetensors"].model_copy(update={"sha256": file_digest(stale)})
    files = index.files | {"int8/layers.0.down.safetensors": entry}
    write_json(folder / INDEX, index.model_copy(update={"files": files}))
    _, events = bank_of(raw)
    assert len(built(events)) == len(before) and stale.stat().st_size > 8
    assert places(folder / "nf4") == before


def test_a_new_version_of_its_package_packs_nf4_anew(raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(raw["output"]) / "bank"
    before = {level: places(folder / level) for level in ("nf4", "int8")}
    (about := tmp_path / "new" / "bitsandbytes-99.0.dist-info").mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(str(about.parent))
    bank_of(raw)
    after = {level: places(folder / level) for level in ("nf4", "int8")}
    assert after["int8"] == before["int8"] and not set(after["nf4"].values()) & set(before["nf4"].values())


def test_entries_that_a_new_bank_lacks_are_kept(raw: Raw) -> None:
    """Those of the paper's flow may be of other formats than the run's."""
    folder = Path(raw["output"]) / "bank"
    flip_a_byte(folder / "int8" / "layers.0.down.safetensors")
    record, _ = bank_of(with_key(raw, "quantize.bits", [4, 16]))
    assert {name.partition("/")[0] for name in record.files} == {"nf4"}
    assert set(folder_digests(folder)) == {*read_index(folder).files, INDEX}
    _, events = bank_of(raw)
    assert built(events) == ["layers.0.down"]


@pytest.fixture
def with_controls(sensed_raw: Raw, tiny_raw: Raw) -> Context:
    """A run of formats that the paper does not use, with the entries of its controls."""
    shutil.copytree(sensed_raw["output"], tiny_raw["output"])
    del tiny_raw["quantize"]["bits"]
    keys = {"quantize.formats": ["q4_0", "q8_0"], "sensitivity.methods": ["mutual_information"], "lora.rank": 32}
    config = validate_config(with_keys(tiny_raw, **keys))
    run(config, ignore, until="sensitivity")
    context = Context(config, RunDir(Path(config.output)), ignore, None, preflight.inspect(config))
    recorded(context)
    add_entries(Bank(context), [plan for _, plan in controls(context)])
    return context


def test_the_bank_takes_the_room_that_was_estimated(with_controls: Context) -> None:
    context = with_controls
    assert {"nf4", "q4_0"} <= {path.name for path in context.bank.iterdir()}
    banks = [context.bank_of(cut) for cut in ("cut-20", "base")]
    size = sum(path.stat().st_size for bank in banks for path in bank.rglob("*.safetensors"))
    assert size <= Bank(context).disk_bytes() < 1.5 * size


def interrupt(raw: Raw, num_groups: int) -> list[Event]:
    """Build this many groups, then end the command as Ctrl-C does."""
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if len(built(events)) == num_groups:
            raise KeyboardInterrupt  # the signal itself is ignored where tests run in the background

    with pytest.raises(KeyboardInterrupt):
        run(validate_config(raw), emit, until="bank")
    return events


def test_groups_of_an_interrupted_command_are_reused(finished: Path, tiny_raw: Raw) -> None:
    """A group whose file is damaged in between is built again."""
    first = interrupt(tiny_raw, 3)
    flip_a_byte(Path(tiny_raw["output"]) / ".scratch-bank" / "int8" / f"{built(first)[1]}.safetensors")
    _, events = bank_of(tiny_raw)
    assert set(built(first)) & set(built(events)) == {built(first)[1]}
    assert len({*built(first), *built(events)}) == 8
    assert read_index(Path(tiny_raw["output"]) / "bank").files == read_index(finished / "bank").files


def test_files_of_an_interrupted_bank_change_no_other_bank(raw: Raw) -> None:
    """The interrupted command had linked files of the finished bank."""
    raw = with_key(raw, "quantize.bits", [4, 16])
    record, _ = bank_of(raw)
    shutil.rmtree(Path(raw["output"]) / "bank" / "int8")
    interrupt(with_key(raw, "quantize.bits", [4, 8, 16]), 1)
    other = with_key(raw, "lora.rank", 2)
    first = interrupt(other, 2)
    again, events = bank_of(raw)
    assert built(events) == [] and "damaged" not in said(events)
    assert again == record
    record, events = bank_of(other)
    assert not set(built(first)) & set(built(events))
    assert set(folder_digests(Path(raw["output"]) / "bank")) == {*record.files, INDEX}


def test_a_bank_of_other_weights_is_not_used(raw: Raw, tmp_path: Path) -> None:
    """Neither is a bank of other weights that was copied into the run folder by hand."""
    folder = Path(raw["output"]) / "bank"
    before, _ = bank_of(raw)
    shutil.copytree(folder, tmp_path / "copy")
    other = with_key(raw, "prune.rate", 0.3)
    after, events = bank_of(other)
    name = "nf4/layers.0.down.safetensors"
    assert before.files[name] != after.files[name] and len(built(events)) == 8
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)
    record, events = bank_of(other)
    assert record.files == after.files and built(events), "only what differs is built again"


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


@pytest.mark.slow
def test_a_bank_file_damaged_under_a_search_stops_it(raw: Raw) -> None:
    """The disk flips a byte after the bank was checked, so the trials that read it say nothing about their plans."""
    raw = with_key(with_key(raw, "search.max_trials", 3), "sensitivity.methods", ["mutual_information"])
    path = Path(raw["output"]) / "bank" / "nf4" / "layers.1.down.safetensors"

    flipped: list[Event] = []

    def flip(event: Event) -> None:
        if isinstance(event, TrialChanged) and not flipped:
            flipped.append(event)
            flip_a_byte(path)

    with pytest.raises(StageError, match="damaged") as caught:
        run(validate_config(raw), flip, until="search")
    assert str(path) in caught.value.cause
    assert "repeat the command" in caught.value.remedy
    events: list[Event] = []
    searched = run(validate_config(raw), events.append, until="search").search
    assert searched is not None
    assert built(events) == ["layers.1.down"]
    assert (searched.num_trials, searched.num_failed) == (3, 0)


@pytest.mark.slow
def test_a_damaged_bank_of_finalists_is_built_again(tiny_raw: Raw) -> None:
    """The second command tries the given plan only, and scores the controls of the first again."""
    del tiny_raw["quantize"]["bits"]
    keys = {"quantize.formats": ["q4_0", "q8_0"], "sensitivity.methods": ["mutual_information"], "search.steps": 1}
    raw, root = with_keys(tiny_raw, **keys), Path(tiny_raw["output"])
    run(validate_config(raw), ignore, until="search")
    config = validate_config(raw)
    context = Context(config, RunDir(root), ignore, None, preflight.inspect(config))
    for checkpoint in (checkpoints := list(root.glob("trials/*/*/checkpoint-*"))):
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        assert context.checkpoint_bytes < 1.2 * size < 2 * context.checkpoint_bytes, "adapter and moments in float32"
    assert checkpoints
    papers, base = root / "bank" / "nf4", root / "banks" / "base" / "q4_0"
    intact, before = places(papers), folder_digests(base)
    flip_a_byte(base / min(before))
    (root / "bank" / "q8_0" / "layers.1.down.safetensors").unlink()
    scores = list(root.glob("trials/*/*/fresh.json"))
    for path in scores:
        path.unlink()
    events: list[Event] = []
    run(validate_config(with_key(raw, "search.plan", "mutual_information")), events.append, until="search")
    assert built(events) == ["layers.1.down"] and places(papers) == intact
    assert folder_digests(base) == before and any(path.exists() for path in scores)
