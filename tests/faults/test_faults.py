"""Real faults while stages run: damaged files, a full disk, NaN in weights and losses."""

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Raw,
    assert_has,
    fill,
    flip_a_byte,
    flipped,
    full_until_noticed,
    raw_config,
    run_program,
    texts,
    with_key,
)
from mixed_models import bank_of_run
from raylets import raylet_of, raylets

from qpruner.cli.main import _guarded
from qpruner.config.load import validate_config
from qpruner.errors import CorruptFile, StageError
from qpruner.pipeline.evaluate import Evaluate
from qpruner.pipeline.flow import STAGES, explained
from qpruner.pipeline.run import run
from qpruner.pipeline.search import Search
from qpruner.runs.events import (
    Emit,
    Event,
    Message,
    Progress,
    StageFinished,
    StageSkipped,
    StageStarted,
)
from qpruner.runs.records import (
    BankRecord,
    PrepareRecord,
    PruneRecord,
    Results,
    SensitivityRecord,
    TrialRecord,
)
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import folder_digests, read_json
from qpruner.runs.storage.base import list_path
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob, set_aside_damaged

CUT = "cut-20"
RECORDS = {
    "prepare": PrepareRecord,
    "prune": PruneRecord,
    "bank": BankRecord,
    "sensitivity": SensitivityRecord,
}


def names(events: list[Event], kind: type[Event]) -> list[str]:
    """List the stages of the events of one kind."""
    return [event.stage for event in events if isinstance(event, kind)]


def go(
    raw: Raw, until: str, emit: Emit | None = None, address: str | None = None
) -> tuple[Results, list[Event]]:
    """Run the flow in this process or on a cluster; return the records and the events."""
    events = []

    def on_event(event: Event) -> None:
        events.append(event)
        if emit:
            emit(event)

    return run(validate_config(raw), on_event, address, until), events


def failing(raw: Raw, *others: Any) -> StageError:
    """Run the flow as `go` does; it must fail in a stage; return the error."""
    with pytest.raises(StageError) as caught:
        go(raw, *others)
    assert caught.value.exit_code == 1
    return caught.value


@pytest.fixture(scope="module")
def banked(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a run up to the bank."""
    root = tmp_path_factory.mktemp("banked") / "run"
    go(raw_config(tiny_model, root), "bank")
    return root


def copy_of(root: Path, raw: Raw) -> Path:
    """Copy a run to the `output` of a configuration."""
    return shutil.copytree(root, Path(raw["output"]))


def bank_in(root: Path) -> BankRecord:
    """Read the record of the bank of a run, in which each file stands with its digest."""
    bank = RunDir(root).read_record("bank", BankRecord)
    assert bank is not None
    return bank


@pytest.fixture
def on_disk(disk: Path, tiny_raw: Raw) -> Raw:
    """A configuration whose run is on a small file system."""
    return with_key(tiny_raw, "output", str(disk / "run"))


# ---- damaged files


@pytest.mark.parametrize(
    ("place", "damage"),
    [
        # Only trials read the rows of `train`, so that no earlier stage notices the damage.
        pytest.param(
            "prepare/data/train",
            lambda rows: flip_a_byte(next(rows.glob("*.arrow"))),
            id="rows-flipped",
        ),
        pytest.param("prepare/data/train", shutil.rmtree, id="rows-missing"),
        pytest.param(
            "cuts/cut-20",
            lambda model: flip_a_byte(model / "model.safetensors"),
            id="weights-flipped",
        ),
        pytest.param("cuts/cut-20", lambda model: flip_a_byte(list_path(model)), id="list-flipped"),
        pytest.param("cuts/cut-20", shutil.rmtree, id="model-missing"),
    ],
)
def test_only_damaged_files_are_set_aside_and_made_again(
    place: str, damage: Callable[[Path], object], banked: Path, tiny_raw: Raw
) -> None:
    root = copy_of(banked, tiny_raw)
    folder = root / place
    stage = place.partition("/")[0].replace("cuts", "prune")
    # it has the seconds
    before = folder_digests(folder)
    measured = {"cut.json": ""} if stage == "prune" else {}
    damage(folder)
    _, events = go(tiny_raw, "bank")
    [told] = [text for text in texts(events) if str(folder) in text]
    for aside in (root / "damaged").glob("*[0-9]"):
        assert str(aside) in told
        assert aside.name.startswith(f"{place.replace('/', '-')}-")
    assert names(events, StageFinished) == [stage]
    assert {*names(events, StageSkipped)} == {"prepare", "prune", "bank"} - {stage}
    assert {**folder_digests(folder), **measured} == {**before, **measured}
    # Now everything is intact again.
    assert names(go(tiny_raw, "bank")[1], StageFinished) == []


def test_rows_damaged_during_a_stage_are_named(banked: Path, tiny_raw: Raw) -> None:
    rows = copy_of(banked, tiny_raw) / "prepare" / "data" / "sensitivity"

    def damage(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "sensitivity":
            os.truncate(next(rows.glob("*.arrow")), 200)

    error = failing(tiny_raw, "sensitivity", damage)
    assert error.stage == "sensitivity"
    assert str(rows) in error.cause
    assert error.remedy.startswith("repeat the command: the damaged file is set aside")
    # The next command makes the file again.
    assert names(go(tiny_raw, "bank")[1], StageFinished)[0] == "prepare"


SET_ASIDE = "repeat the command: the damaged file is set aside, and "


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        (
            "candidates/uniform-4-bit/record.json",
            "delete {run}/candidates/uniform-4-bit, then repeat the command",
        ),
        (
            "candidates/searched/adapter/adapter_config.json",
            "delete {run}/candidates/searched, then repeat",
        ),
        ("search/best.json", "delete {run}/records/search.json, then repeat the command"),
        ("final/config.json", "delete {run}/final, then repeat the command"),
        # Deleting these would lose a plan, the intact entries of a bank, or a model that was only
        # unreachable.
        ("banks/cut-20/grams/model.layers.0.safetensors", SET_ASIDE),
        ("cuts/cut-20/model.safetensors", SET_ASIDE),
        ("trials/0123abcd/0003/trial.json", SET_ASIDE),
        ("trials/0123abcd/search-0123abcd.json", SET_ASIDE),
        ("../models/trials/record.json", "fetch or write that file again"),
    ],
)
def test_the_remedy_for_a_damaged_file_loses_nothing_else(
    file: str, remedy: str, tmp_path: Path
) -> None:
    """The other files took hours, and users need not delete files of their own."""
    run = tmp_path / "run"
    path = (run / file).resolve()
    path.parent.mkdir(parents=True)
    path.write_text('{"index": 3, "dig')
    with pytest.raises(StageError) as caught, explained(Search, run):
        read_json(path, TrialRecord)
    assert str(path) in caught.value.cause
    assert caught.value.remedy.startswith(remedy.format(run=run))
    if file.startswith("trials/"):
        notes = []
        set_aside_damaged(run / "trials" / "0123abcd", "0123abcd", notes.append)
        assert len(notes) == 1
        assert str(path) in notes[0]
        assert "set aside" in notes[0]


def test_errors_of_other_readers_get_a_remedy(tmp_path: Path) -> None:
    """The error for a missing adapter names its row; the next command repairs a damaged safetensors
    file."""
    from safetensors.torch import load_file

    from qpruner.training.checkpoints import load_trained

    row = tmp_path / "candidates" / "searched"
    with pytest.raises(StageError) as caught, explained(Evaluate, tmp_path):
        load_trained(torch.nn.Identity(), row / "trained")  # type: ignore[arg-type]
    assert caught.value.remedy.startswith(f"delete {row}, then")
    (path := tmp_path / "model.safetensors").touch()
    with (
        pytest.raises(StageError, match="a safetensors file is damaged") as caught,
        explained(Search, tmp_path),
    ):
        load_file(path)
    assert caught.value.remedy.startswith("repeat the command")
    assert "delete" not in caught.value.remedy


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("prune", "calibration.batch_size"),
        ("sensitivity", "sensitivity.batch_size"),
        ("search", "training.micro_batch_size"),
        ("finetune", "training.micro_batch_size"),
        ("comparison", "training.micro_batch_size"),
        ("evaluate", "evaluate.batch_size"),
    ],
)
def test_the_remedy_for_memory_fits_the_stage(stage: str, key: str) -> None:
    stages = {each.name: each for each in STAGES}
    with pytest.raises(StageError) as caught, explained(stages[stage]):
        torch.empty(2**50)
    assert caught.value.remedy.startswith(f"lower `{key}` or ")
    assert ("gradient_checkpointing" in caught.value.remedy) == key.startswith("training.")


def test_a_slightly_different_cut_gets_its_own_bank(tiny_raw: Raw) -> None:
    """Machines of another kind round differently; here, other instructions of this one do."""
    raw = with_key(tiny_raw, "prune.compensation", "least_squares")
    before, _ = go(raw, "bank")
    weights = RunDir(raw["output"]).cut("cut-20") / "model.safetensors"
    original = weights.read_bytes()
    flip_a_byte(weights)
    with torch.backends.mkldnn.flags(enabled=False):
        after, events = go(raw, "bank")
    if weights.read_bytes() == original:
        pytest.skip("all instructions of this machine round alike")
    assert names(events, StageFinished) == ["prune", "bank"]
    # No trial is reused either.
    assert before.bank.digest != after.bank.digest
    packed = [event for event in events if isinstance(event, Progress) and event.stage == "bank"]
    assert {event.done for event in packed} == {*range(1, 9)}


def unmeasured(record: Any) -> Any:
    """Leave out the measurements that differ each time."""
    if not isinstance(record, dict):
        return record
    return {
        key: unmeasured(each)
        for key, each in record.items()
        if key not in ("seconds", "peak_memory_bytes", "record_digest")
    }


@pytest.mark.parametrize(
    ("stage", "damage"),
    [
        ("prepare", lambda text: text[: len(text) // 2]),
        ("prune", lambda text: flipped(text, b'"digest": "')),
        ("bank", lambda text: flipped(text, re.search(rb'"seconds": \d+\.', text)[0])),
    ],
    ids=["truncated", "digest-flipped", "number-flipped"],
)
def test_a_corrupt_record_is_named_and_its_stage_runs_again(
    stage: str, damage: Callable[[bytes], bytes], banked: Path, tiny_raw: Raw
) -> None:
    run_dir = RunDir(copy_of(banked, tiny_raw))
    record = run_dir.record_path(stage)
    before = unmeasured(json.loads(record.read_text()))
    record.write_bytes(damage(record.read_bytes()))
    _, events = go(tiny_raw, "bank")
    [told] = [text for text in texts(events) if str(record) in text]
    # A message is one line.
    assert "runs again" in told
    assert "\n" not in told
    # Later stages are unchanged.
    assert names(events, StageFinished) == [stage]
    assert unmeasured(json.loads(record.read_text())) == before


# ---- a full disk


def assert_full(error: StageError, stage: str) -> None:
    """Check that a stage failed for want of room, and that the remedy says so."""
    assert error.stage == stage
    assert "no space left" in error.cause
    assert "make room" in error.remedy


@pytest.mark.parametrize(("stage", "leave"), [("prune", 100_000), ("bank", 4096)])
def test_a_disk_that_fills_up_fails_only_that_stage(
    stage: str, leave: int, disk: Path, banked: Path, on_disk: Raw
) -> None:
    def fill_at_start(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == stage:
            fill(disk, leave)

    error = failing(on_disk, "bank", fill_at_start)
    assert_full(error, stage)
    assert str(disk) in error.cause

    earlier = list(RECORDS)[: list(RECORDS).index(stage)]
    run_dir = RunDir(disk / "run")
    assert [name for name, kind in RECORDS.items() if run_dir.read_record(name, kind)] == earlier
    (disk / "filler").unlink()
    assert names(go(on_disk, "bank")[1], StageSkipped) == earlier
    assert bank_in(disk / "run").files == bank_in(banked).files


def test_a_disk_full_between_cuts_keeps_the_finished_ones(disk: Path, on_disk: Raw) -> None:
    raw = on_disk
    raw["prune"] = {"rates": [0.1, 0.2], "compensation": "none"}
    raw["quantize"]["budget"] = {"bytes": 200_000}

    def fill_after_one(event: Event) -> None:
        if isinstance(event, Message) and event.text.startswith("10 % pruned:"):
            fill(disk, 100_000)

    error = failing(raw, "prune", fill_after_one)
    assert_full(error, "prune")
    (disk / "filler").unlink()
    results, events = go(raw, "prune")
    made = [text.partition(":")[0] for text in texts(events) if " loss " in text]
    assert made == ["20 % pruned"]
    assert list(results.prune.cuts) == ["base", "cut-10", "cut-20"]


@pytest.mark.parametrize(("stage", "kind"), [("prune", StageStarted), ("bank", Progress)])
def test_a_disk_full_for_a_while_only_delays_a_stage(
    stage: str, kind: type[Event], disk: Path, banked: Path, on_disk: Raw
) -> None:
    """For the bank, this is after its first entry; a bank without any room is refused with its
    size."""
    with contextlib.ExitStack() as meanwhile:

        def fill_once(event: Event) -> None:
            if isinstance(event, kind) and event.stage == stage and not fillers:
                fillers.append(meanwhile.enter_context(full_until_noticed(disk, 4096)))

        fillers = []
        go(on_disk, "bank", fill_once)
        # It was waited for.
        assert not fillers[0].exists()
    assert bank_in(disk / "run").files == bank_in(banked).files


@pytest.mark.slow
def test_a_shared_folder_gone_from_a_node_fails_the_stage(tiny_raw: Raw) -> None:
    """On the only node that works, another file system hides the run folder; this mount is gone
    with the node."""
    raw = with_key(with_key(tiny_raw, "prune.steps", 40), "prune.importance", "taylor")
    record = RunDir(raw["output"]).record_path("prune")

    def hide(event: Event) -> None:
        if isinstance(event, Progress) and "step 2 of 40" in event.detail:
            place = f"--mount=/proc/{raylet_of(node).pid}/ns/mnt"
            run_program("nsenter", place, "mount", "-t", "tmpfs", "apart", raw["output"])

    with raylets(0) as cluster:
        node = cluster.add_apart("true")
        error = failing(raw, "prune", hide, cluster.address)
    assert error.stage == "prune"
    assert "was written on another machine and is missing here" in error.cause
    assert "share `output` between both machines" in error.remedy
    assert not record.exists()
    go(raw, "prune")
    assert record.exists()


# ---- NaN


def model_with_nan(model: Path, folder: Path, parameter: str) -> Path:
    """Copy a model, with one NaN in one parameter."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(model, folder)
    tensors = load_file(copy / "model.safetensors")
    tensors[parameter].view(-1)[0] = math.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("importance", "rate", "parameter"),
    [
        pytest.param("taylor", 0.2, "model.layers.1.mlp.down_proj.weight", id="taylor"),
        pytest.param("magnitude", 0.2, "model.norm.weight", id="outside-the-blocks"),
        pytest.param("taylor", 0.0, "model.layers.0.self_attn.q_proj.weight", id="not-pruned"),
    ],
)
def test_nan_weights_stop_the_first_stage_that_reads_them(
    importance: str, rate: float, parameter: str, tiny_raw: Raw, tmp_path: Path
) -> None:
    model = model_with_nan(Path(tiny_raw["model"]["source"]), tmp_path / "model", parameter)
    raw = with_key(with_key(tiny_raw, "prune.importance", importance), "prune.rate", rate)
    error = failing(with_key(raw, "model.source", str(model)), "sensitivity")
    assert_has(error, stage="prune", cause=f"the weight {parameter} is NaN or infinite")
    # Nothing has been trained yet.
    assert "weights" in error.remedy
    assert "learning_rate" not in error.remedy
    report = (Path(tiny_raw["output"]) / "report.md").read_text()
    # A failed run has its report.
    assert f"Failed in stage prune: {error.cause}" in report


def trial_of(root: Path, raw: Raw, data: str = "prepare/data") -> TrialJob:
    """Make a trial of a run that has a bank, with every group at 4 bits."""
    plan = dict.fromkeys(bank_in(root).residual_ratio["nf4"], "nf4")
    config = validate_config(raw)
    return TrialJob(config, Materials({CUT: bank_of_run(config)}, root / data), plan, CUT)


def test_a_diverging_trial_names_step_and_learning_rate(banked: Path, tiny_raw: Raw) -> None:
    raw = with_key(tiny_raw, "training.learning_rate", 1e30)
    job = trial_of(copy_of(banked, tiny_raw), raw)
    with pytest.raises(StageError) as caught, explained(Search):
        run_trial(job, None, lambda result, checkpoint: None)
    assert caught.value.stage == "search"
    assert re.search("(?i)nan at step", caught.value.cause)
    assert "`training.learning_rate`" in caught.value.remedy


def test_a_trial_reports_progress_while_it_loads(banked: Path, tiny_raw: Raw) -> None:
    """Loading may take longer than the limit for hung trials.

    The rows are loaded last, and are missing here.
    """
    root = copy_of(banked, tiny_raw)
    beats = []
    job = trial_of(root, tiny_raw, "nowhere")
    with pytest.raises(CorruptFile, match="nowhere"):
        run_trial(job, None, lambda result, checkpoint: None, beats.append)
    assert len(beats) > len(list((root / "cuts" / CUT).iterdir())) + len(job.plan)


# ---- Ctrl-C


@pytest.mark.parametrize(("on_path", "program"), [(True, "qpruner"), (False, ".venv/bin/qpruner")])
def test_ctrl_c_prints_a_command_that_this_shell_finds(
    on_path: bool,
    program: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> dict[str, object]:
        raise KeyboardInterrupt

    (tmp_path / "qpruner").write_text("#!/bin/sh\n")
    (tmp_path / "qpruner").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if on_path else "/nowhere")
    monkeypatch.setattr(sys, "argv", [".venv/bin/qpruner", "run", "my config.yaml"])
    with pytest.raises(SystemExit) as ended:
        _guarded(False, interrupted)
    assert ended.value.code == 130
    assert (
        capsys.readouterr().err == f"interrupted; continue with: {program} run 'my config.yaml'\n"
    )
