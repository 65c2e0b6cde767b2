"""The bank stage: it makes what is missing only, and whoever reads a damaged entry makes that one
again."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    changed_by,
    events_of,
    flip_a_byte,
    ignore,
    raw_config,
    texts,
    with_key,
    with_keys,
)
from mixed_models import bank_of_run
from safetensors.torch import load_file, save_file
from whole_runs import comparable

from qpruner.config.load import validate_config
from qpruner.errors import CorruptFile, UserError
from qpruner.pipeline import preflight
from qpruner.pipeline.bank import Bank
from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import controls
from qpruner.pipeline.flow import recorded
from qpruner.pipeline.run import check, run
from qpruner.quantization.bank import BankSource, read_plan
from qpruner.quantization.formats import format_of, formats
from qpruner.runs.events import Event, Progress, StageSkipped, TrialChanged
from qpruner.runs.records import BankRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import folder_digests

Raw = dict[str, Any]
DOWN = "layers.1.down"


def filled(raw: Raw) -> tuple[BankRecord, list[Event]]:
    """Run as far as the bank."""
    events: list[Event] = []
    record = run(validate_config(raw), events.append, until="bank").bank
    assert record is not None
    return record, events


def bank_in(raw: Raw) -> BankSource:
    return bank_of_run(validate_config(raw))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    root = tmp_path_factory.mktemp("banked") / "run"
    filled(raw_config(tiny_model, root))
    return root


@pytest.fixture
def raw(finished: Path, tiny_raw: Raw) -> Raw:
    """A configuration whose run folder has a finished bank."""
    shutil.copytree(finished, tiny_raw["output"])
    return tiny_raw


def built(events: list[Event]) -> list[str]:
    """List the groups that were built."""
    return [event.detail for event in events_of(events, Progress, "bank")]


def is_skipped(events: list[Event]) -> bool:
    return bool(events_of(events, StageSkipped, "bank"))


def test_a_finished_bank_is_not_made_again(raw: Raw) -> None:
    """Not even where an entry is damaged: that one is made again by whoever reads it."""
    bank = bank_in(raw)
    before = folder_digests(bank.folder)
    flip_a_byte(bank.file(DOWN, "nf4"))
    bank.file("layers.0.qkv", "int8").unlink()
    _, events = filled(raw)
    assert is_skipped(events)
    assert built(events) == []
    read_plan(bank, {DOWN: "nf4", "layers.0.qkv": "int8"})
    assert folder_digests(bank.folder) == before


def test_another_format_builds_no_file_anew(tiny_raw: Raw) -> None:
    filled(with_key(tiny_raw, "quantize.bits", [4, 16]))
    folder = bank_in(tiny_raw).folder / "nf4"
    before = places(folder)
    record, _ = filled(with_key(tiny_raw, "quantize.bits", [4, 8, 16]))
    assert places(folder) == before
    assert len(record.files) == len(before)


def places(folder: Path) -> dict[str, tuple[int, int]]:
    """Tell files apart from later ones of the same name."""
    stats = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.parametrize("changed", ["int8", "nf4"])
def test_a_new_version_is_packed_anew(
    changed: str, raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a format, or of the package that packs it."""
    folder = bank_in(raw).folder
    before = {level: places(folder / level) for level in ("nf4", "int8")}
    if changed == "int8":
        int8 = format_of("int8")
        monkeypatch.setitem(formats(), "int8", replace(int8, version=int8.version + 1))
    else:
        about = tmp_path / "new" / "bitsandbytes-99.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 99.0\n"
        )
        monkeypatch.syspath_prepend(str(about.parent))
    _, events = filled(raw)
    assert len(built(events)) == 8
    for level, files in before.items():
        kept = set(places(folder / level).values()) & set(files.values())
        assert bool(kept) == (level != changed)


def test_entries_that_a_new_bank_lacks_are_kept(raw: Raw) -> None:
    """Those of the paper's flow may be of other formats than the run's; what a killed process left
    is removed."""
    bank = bank_in(raw)
    before = folder_digests(bank.folder)
    (bank.folder / "int8" / ".layers.0.down.safetensors.123").write_bytes(b"a part")
    record, _ = filled(with_key(raw, "quantize.bits", [4, 16]))
    assert {name.partition("/")[0] for name in record.files} == {"nf4"}
    assert folder_digests(bank.folder) == before
    _, events = filled(raw)
    assert built(events) == []


@pytest.fixture
def with_controls(sensed_raw: Raw, tiny_raw: Raw) -> Context:
    """A run of formats that the paper does not use, with the entries of its controls."""
    shutil.copytree(sensed_raw["output"], tiny_raw["output"])
    del tiny_raw["quantize"]["bits"]
    keys = {
        "quantize.formats": ["q4_0", "q8_0"],
        "sensitivity.methods": ["mutual_information"],
        "lora.rank": 32,
    }
    config = validate_config(with_keys(tiny_raw, **keys))
    run(config, ignore, until="sensitivity")
    context = Context(config, RunDir(Path(config.output)), ignore, None, preflight.inspect(config))
    recorded(context)
    for _, plan in controls(context):
        read_plan(context.places.bank_of(plan.cut), plan.as_dict())
    return context


def test_the_bank_takes_at_most_the_estimated_room(with_controls: Context) -> None:
    folder = with_controls.places.bank_of("cut-20").folder
    assert {"nf4", "q4_0"} <= {path.name for path in folder.iterdir()}
    files = (with_controls.run_dir.root / "banks").rglob("*.safetensors")
    size = sum(path.stat().st_size for path in files)
    assert size <= Bank(with_controls).disk_bytes() < 1.5 * size


def interrupt(raw: Raw, num_groups: int) -> list[Event]:
    """Build this many groups, then end the command as Ctrl-C does."""
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if len(built(events)) == num_groups:
            # the signal itself is ignored where tests run in the background
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(validate_config(raw), emit, until="bank")
    return events


def test_groups_of_an_interrupted_command_are_reused(finished: Path, tiny_raw: Raw) -> None:
    first = interrupt(tiny_raw, 3)
    _, events = filled(tiny_raw)
    assert not set(built(first)) & set(built(events))
    assert len({*built(first), *built(events)}) == 8
    assert folder_digests(bank_in(tiny_raw).folder) == folder_digests(finished / "banks" / "cut-20")


def test_a_bank_of_other_weights_is_not_used(raw: Raw, tmp_path: Path) -> None:
    """Neither is a bank of other weights that was copied into the run folder by hand."""
    folder = bank_in(raw).folder
    before, _ = filled(raw)
    shutil.copytree(folder, tmp_path / "copy")
    other = with_key(raw, "prune.importance", "random")
    after, events = filled(other)
    name = "nf4/layers.0.down.safetensors"
    assert before.files[name] != after.files[name]
    assert len(built(events)) == 8
    expected = folder_digests(folder)
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)
    read_plan(bank_in(other), {DOWN: "nf4"})
    digests = folder_digests(folder)
    assert digests[f"nf4/{DOWN}.json"] == expected[f"nf4/{DOWN}.json"]
    # Not needed yet.
    assert digests[f"int8/{DOWN}.json"] != expected[f"int8/{DOWN}.json"]


def test_a_cut_that_no_format_holds_is_left_out(tiny_raw: Raw) -> None:
    """Its widths depend on scores, so this shows only once it is made: here in one block only."""
    del tiny_raw["quantize"]["bits"]
    changes = (
        "prune={rates: [0, 0.05], round_to: 16, units: [mlp]}; "
        "quantize.budget={bytes: 400000}; quantize.formats=[q4_0, q8_0]"
    )
    raw = changed_by(changes, tiny_raw)
    model = Path(raw["output"]).parent / "model"
    shutil.copytree(raw["model"]["source"], model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.2
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = validate_config(with_key(raw, "model.source", str(model)))
    raw = with_key(raw, "model.source", str(model))
    assert list(preflight.inspect(config).shapes.cuts) == ["base", "cut-5"]
    record, events = filled(raw)
    assert list(record.left_out) == ["cut-5"]
    assert "columns do not divide by 32" in record.left_out["cut-5"]
    assert any("left out" in text for text in texts(events))
    warnings = check(config, ignore).inspection.warnings
    assert any("5 % pruned is left out" in text for text in warnings)
    _, events = filled(raw)
    assert is_skipped(events)


def test_a_cut_slower_than_expected_is_refused_before_packing(tiny_raw: Raw) -> None:
    """The check before the run knows expected widths only, and allows for that."""
    budget = {"bytes": 400_000}
    raw = with_keys(tiny_raw, **{"prune": {"rates": [0.1]}, "quantize.budget": budget})
    cuts = run(validate_config(raw), ignore, until="prune").prune.cuts  # type: ignore[union-attr]
    share = round(cuts["cut-10"].multiply_adds / cuts["base"].multiply_adds - 0.005, 4)
    with pytest.raises(UserError, match="no cut takes so few multiply-adds"):
        filled(with_key(raw, "quantize.budget", budget | {"flops_fraction": share}))
    assert not RunDir(raw["output"]).read_record("bank", BankRecord)


GPTQ = "quantize.rounding=gptq; calibration.num_samples=4; quantize.formats=[q4_0, bf16]"


def test_gram_matrices_are_kept_for_first_use(tiny_raw: Raw) -> None:
    """Those of every cut; a damaged one is found when it is read, and gathered again by the next
    command."""
    del tiny_raw["quantize"]["bits"]
    raw = changed_by(GPTQ, tiny_raw)
    filled(raw)
    root = Path(raw["output"]) / "banks"
    before = folder_digests(root)
    for cut in ("base", "cut-20"):
        assert f"{cut}/grams/model.layers.0.json" in before
        assert f"{cut}/grams/model.layers.1.json" in before
    bank = bank_in(raw)
    bank.file(DOWN, "q4_0").unlink()
    read_plan(bank, {DOWN: "q4_0"})
    assert folder_digests(root) == before, "made again by the same matrices"
    flip_a_byte(root / "cut-20" / "grams" / "model.layers.1.safetensors")
    bank.file(DOWN, "q4_0").unlink()
    with pytest.raises(CorruptFile, match=r"grams/model\.layers\.1\.safetensors.*damaged"):
        read_plan(bank, {DOWN: "q4_0"})
    _, events = filled(raw)
    assert not is_skipped(events)
    assert [group for group in built(events) if "layers." in group] == [DOWN]
    assert folder_digests(root) == before


@pytest.mark.slow
def test_workers_build_what_this_process_builds(
    raw: Raw, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = filled(raw)
    monkeypatch.setattr("qpruner.quantization.bank.FEW_WEIGHTS", 0)
    with_workers, events = filled(raw_config(tiny_model, tmp_path / "workers"))
    assert with_workers.files == here.files
    assert with_workers.residual_ratio == here.residual_ratio
    assert sorted(built(events)) == sorted({Path(name).stem for name in here.files})


@pytest.mark.slow
def test_entries_damaged_under_a_search_are_made_again(tiny_raw: Raw) -> None:
    """Also those of the base model, which only controls use, and for the second command's scores of
    finalists."""
    changes = "search.max_trials=3; search.steps=1; sensitivity.methods=[mutual_information]"
    raw = changed_by(changes, tiny_raw)
    root = Path(tiny_raw["output"])
    filled(raw)
    bank = bank_in(raw)
    flipped: list[Event] = []
    before = folder_digests(bank.folder)

    def flip(event: Event) -> None:
        if isinstance(event, TrialChanged) and not flipped:
            flipped.append(event)
            flip_a_byte(bank.file(DOWN, "nf4"))

    searched = run(validate_config(raw), flip, until="search").search
    assert searched
    assert searched.num_failed == 0
    assert before.items() <= folder_digests(bank.folder).items()
    config = validate_config(raw)
    expected = preflight.inspect(config).shapes.checkpoint_bytes
    checkpoints = list(root.glob("trials/*/*/checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        assert expected < 1.2 * size < 2 * expected, "adapter and moments in float32"
    whole = folder_digests(root / "banks")
    flip_a_byte(next((root / "banks" / "base").rglob("*.safetensors")))
    scores = list(root.glob("candidates/*/record.json"))
    assert scores
    for path in scores:
        path.unlink()
    (root / "records" / "search.json").unlink()
    again = run(config, ignore, until="search").search
    assert again
    one, other = (comparable(record.model_dump(mode="json")) for record in (searched, again))
    assert one["finalists"] == other["finalists"]
    assert folder_digests(root / "banks") == whole
