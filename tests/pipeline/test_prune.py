"""The prune stage: its folder, its record, its calibration samples, and what makes it run again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import command, events_of, raw_config, texts, with_key
from plain_transformers import plain_transformers_answers

from qpruner.config.load import validate_config
from qpruner.errors import UserError
from qpruner.models.loading import load_dense
from qpruner.pipeline import preflight
from qpruner.pipeline.context import Context
from qpruner.pipeline.prepare import Prepare
from qpruner.pipeline.prune import Prune
from qpruner.pipeline.run import run
from qpruner.runs.events import Event, Message, Progress, StageFinished, StageSkipped, StageStarted
from qpruner.runs.records import CutRecord, PrepareRecord, PruneRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Raw = dict[str, Any]
PROMPT = [[5, 77, 300, 12, 45, 201]]


@pytest.fixture
def raw(tiny_model: Path, tmp_path: Path) -> Raw:
    """A configuration that prunes by first-order Taylor, to any width, because it packs no 4-bit
    layers."""
    raw = with_key(raw_config(tiny_model, tmp_path / "run"), "quantize.bits", [8, 16])
    recipe = {
        "importance": "taylor",
        "selection": "per_layer",
        "compensation": "none",
        "round_to": 1,
    }
    return with_key(with_key(raw, "prune", {"rate": 0.2, **recipe}), "calibration.packing", False)


def changed(raw: Raw, **keys: Any) -> Raw:
    """Return the configuration with some keys of `prune` changed."""
    return with_key(raw, "prune", {**raw["prune"], **keys})


def pruned(raw: Raw) -> tuple[CutRecord, Path, list[Event]]:
    """Run the flow up to the prune stage; return the record and the folder of the last cut, and the
    events."""
    events: list[Event] = []
    record = run(validate_config(raw), events.append, until="prune").prune
    assert record is not None
    name, cut = list(record.cuts.items())[-1]
    return cut, RunDir(raw["output"]).cut(name), events


def stages(events: list[Event]) -> dict[str, bool]:
    """Return for each stage whether it ran or was skipped."""
    found = [event for event in events if isinstance(event, StageStarted | StageSkipped)]
    return {event.stage: isinstance(event, StageStarted) for event in found}


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor(PROMPT)).logits.float()
    return logits


# ---- the folder and the record


def rows_of(groups: tuple[int, ...], size: int) -> torch.Tensor:
    """Return the rows of key/value groups that have `size` rows each."""
    return torch.arange(2 * size).view(2, size)[list(groups)].flatten()


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_folder_holds_what_the_record_says(raw: Raw, tiny_model: Path) -> None:
    """The recorded indices are enough to repeat the cut on the base model."""
    record, folder, events = pruned(changed(raw, rate=0.3, steps=2))
    written = RunDir(raw["output"]).read_record("prune", PruneRecord)
    assert written
    assert written.cuts["cut-30"] == record == read_json(folder / "cut.json", CutRecord)
    base = load_dense(str(tiny_model), "bfloat16")
    cut = load_dense(str(folder), "bfloat16")
    assert [layer.layer for layer in record.layers] == [0, 1]
    for layer in record.layers:
        old = base.model.layers[layer.layer]
        new = cut.model.layers[layer.layer]
        keys = rows_of(layer.kept_kv_groups, 64)
        queries = rows_of(layer.kept_kv_groups, 128)
        channels = list(layer.kept_mlp_channels)
        assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight[keys])
        assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[:, queries])
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, channels])
        assert layer.base_kv_groups == 2
        assert layer.base_mlp_channels == 256
        assert layer.heads_per_group == 2
        assert layer.base_parameters == num_parameters(old)
        assert layer.kept_parameters == num_parameters(new)
    before = num_parameters(base)
    after = num_parameters(cut)
    assert record.parameters_before == before
    assert record.parameters_after == after
    assert record.bytes_before == 2 * before
    assert record.bytes_after == 2 * after
    assert record.achieved_rate == pytest.approx((before - after) / before)
    assert abs(record.achieved_rate - 0.3) * before <= 3 * 64
    assert record.target == "target 30.00% of all parameters"
    assert record.importance == "taylor"
    assert record.selection == "per_layer"
    assert record.compensation == "none"
    assert record.seconds > 0
    assert record.peak_memory_bytes >= 0
    assert record.memory_counter
    (finished,) = events_of(events, StageFinished, "prune")
    assert record.target in finished.figures
    assert f"{record.achieved_rate:.2%}" in finished.figures
    (started,) = events_of(events, StageStarted, "prune")
    assert started.detail.endswith("per_layer, in 2 steps")
    with np.load(folder / "importance.npz") as scores:
        assert set(scores.files) == {"0.attention", "0.mlp", "1.attention", "1.mlp"}


def test_a_moved_run_uses_the_base_model_in_its_folder(
    raw: Raw, tiny_model: Path, tmp_path: Path
) -> None:
    """A `.gguf` file is converted into the run folder."""
    run(validate_config(raw), lambda event: None, until="prepare")
    folder = RunDir(raw["output"])
    prepared = folder.read_record("prepare", PrepareRecord)
    assert prepared
    moved_from = str(tmp_path / "gone" / "prepare" / "model")
    folder.write_record(
        "prepare", prepared.model_copy(update={"model_path": moved_from, "converted": True})
    )
    shutil.copytree(tiny_model, folder.stage("prepare") / "model")
    _, _, events = pruned(raw)
    assert stages(events) == {"prepare": False, "prune": True}


def test_pruning_alone_may_leave_any_width(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that also packs the pruned model is refused before the cut."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    raw = with_key(changed(raw, round_to=32, selection="global"), "quantize.bits", [4])
    with pytest.raises(UserError, match=r"bitsandbytes decodes \d+ columns wrongly"):
        run(validate_config(raw), lambda event: None, until="bank")
    record, _, _ = pruned(raw)
    assert any(len(layer.kept_mlp_channels) % 64 for layer in record.layers)


def test_pruning_alone_needs_no_machine_for_trials(raw: Raw) -> None:
    """One prunes on a workstation, and searches on a cluster later."""
    config = validate_config(
        changed(raw, rate=0.2) | {"search": {"resources_per_trial": {"gpu": 64}}}
    )
    for _ in range(2):
        results = run(config, lambda event: None, until="prune")
        assert results.prune and "cut-20" in results.prune.cuts


def test_dropped_blocks_are_listed_and_keep_nothing(raw: Raw) -> None:
    record, folder, _ = pruned(changed(raw, rate=0.5, units=["block", "mlp"], depth_share=0.8))
    assert len(record.dropped_blocks) == 1
    for layer in record.layers:
        is_dropped = layer.layer in record.dropped_blocks
        assert layer.kept_kv_groups == (() if is_dropped else (0, 1))
        assert (layer.kept_parameters == 0) == (layer.kept_mlp_channels == ()) == is_dropped
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    assert abs(record.achieved_rate - 0.5) * record.parameters_before <= 3 * 64
    with np.load(folder / "importance.npz") as scores:
        assert scores["block"][:, 0].tolist() == [0, 1]
        assert int(scores["block"][scores["block"][:, 1].argmin(), 0]) == record.dropped_blocks[0]


def test_a_model_that_was_pruned_earlier_is_not_cut_again(raw: Raw, tmp_path: Path) -> None:
    first, folder, _ = pruned(changed(raw, rate=0.3, first_layer=1))
    again = with_key(with_key(raw, "model.source", str(folder)), "output", str(tmp_path / "again"))
    record, _, events = pruned(again)
    assert "the cut is skipped" in texts(events)[0]
    assert record.parameters_before == record.parameters_after == first.parameters_after
    assert record.achieved_rate == 0


def test_no_weight_file_is_mapped_while_its_model_is_cut(raw: Raw) -> None:
    """The pages of a mapped file stay in memory, so the model would need twice its memory."""
    base = Path(raw["model"]["source"]).resolve()
    maps: list[str] = []

    def read_maps(event: Event) -> None:
        if isinstance(event, Progress) and event.detail.startswith("cutting"):
            maps.append(Path("/proc/self/maps").read_text())

    run(validate_config(changed(raw, rate=0.3)), read_maps, until="prune")
    assert maps
    files = re.findall(r"\S+\.safetensors", "".join(maps))
    assert not [file for file in files if Path(file).parent == base]


# ---- several cuts


def measured(events: list[Event]) -> list[str]:
    """List the passes over the samples that measured importance, and the cuts that were made."""
    passes = [
        event.detail
        for event in events_of(events, Progress, "prune")
        if event.done == event.total and event.detail.startswith("importance")
    ]
    return passes + [text.partition(":")[0] for text in texts(events) if " loss " in text]


def test_cuts_share_importance_and_equal_each_made_alone(raw: Raw, tmp_path: Path) -> None:
    """A further rate in the folder of one cut costs only what is missing."""
    raw = with_key(raw, "quantize.budget", {"bytes": 300_000})
    several = with_key(
        raw, "prune", {**raw["prune"], "rates": [0, 0.1, 0.3], "compensation": "least_squares"}
    )
    del several["prune"]["rate"]
    alone = changed(
        with_key(raw, "output", str(tmp_path / "alone")), rate=0.1, compensation="least_squares"
    )
    _, folder, events = pruned(alone)
    assert measured(events) == ["importance", "10 % pruned"]
    written = (folder / "cut.json").stat().st_mtime_ns
    _, _, events = pruned(several)
    assert measured(events) == [
        "importance",
        "importance, step 2 of 2",
        "10 % pruned",
        "30 % pruned",
    ]
    told = [
        event.detail
        for event in events
        if isinstance(event, StageStarted) and event.stage == "prune"
    ]
    assert told[0].startswith("not pruned, 10 % pruned, 30 % pruned, by taylor, per_layer")
    _, _, events = pruned(with_key(several, "output", alone["output"]))
    assert measured(events) == ["importance, step 2 of 2", "30 % pruned"], (
        "the first step's was kept"
    )
    assert (folder / "cut.json").stat().st_mtime_ns == written
    found = [RunDir(each["output"]).read_record("prune", PruneRecord) for each in (several, alone)]
    known = [each.cuts for each in found if each]
    one, other = (
        {name: (cut.weights, cut.layers, cut.loss) for name, cut in cuts.items()} for cuts in known
    )
    assert one == other
    assert list(one) == ["base", "cut-10", "cut-30"]
    assert [round(cut.achieved_rate, 1) for cut in known[0].values()] == [0.0, 0.1, 0.3]
    work = [cut.multiply_adds for cut in known[0].values()]
    assert work == sorted(work, reverse=True)
    assert work[0] > work[-1]
    assert stages(pruned(several)[2]) == {"prepare": False, "prune": False}


def test_a_cut_that_cannot_be_made_is_left_out(raw: Raw, write_yaml: Callable[[Raw], Path]) -> None:
    """Only block 1 may be cut, which has fewer parameters than the second rate asks for."""
    raw = changed(
        with_key(raw, "quantize.budget", {"bytes": 300_000}),
        rate=None,
        rates=[0.1, 0.6],
        first_layer=1,
    )
    told = r"60 % pruned is left out: .* the highest rate is 0\.\d+ \(`prune.rates`: 0.6\)"
    assert re.search(told, command("check", write_yaml(raw)).output.replace("\n", " "))
    record, folder, events = pruned(raw)
    assert folder.name == "cut-10"
    assert record.target.startswith("target 10.00%")
    assert any(re.search(told, event.text) for event in events if isinstance(event, Message))
    written = RunDir(raw["output"]).read_record("prune", PruneRecord)
    assert written
    assert list(written.left_out) == ["cut-60"]
    with pytest.raises(UserError, match=r"the highest rate is 0\.\d+"):
        pruned(changed(raw, rates=[0.6, 0.7]))


# ---- folders that need no qpruner


def test_uniform_folders_run_where_qpruner_is_not_installed(raw: Raw, tmp_path: Path) -> None:
    """Other folders raise an error there, because a model without some of its weights would answer
    wrongly."""
    both = ["block", "attention", "mlp"]
    kinds = {
        "solved": {"rate": 0.3, "uniform": True, "compensation": "least_squares"},
        "both": {"rate": 0.5, "units": both, "depth_share": 0.5, "uniform": True},
        "ragged": {"rate": 0.3, "first_layer": 1},
    }
    folders = {
        name: pruned(with_key(changed(raw, **keys), "output", str(tmp_path / name)))[1]
        for name, keys in kinds.items()
    }
    answers = dict(
        zip(folders, plain_transformers_answers(PROMPT, folders.values(), tmp_path), strict=True)
    )
    for name in ("solved", "both"):
        model = load_dense(str(folders[name]), "float32")
        assert "refused" not in answers[name], answers[name]
        torch.testing.assert_close(
            torch.tensor(answers[name]["logits"]), logits_of(model), rtol=0, atol=0
        )
        made = model.generate(
            torch.tensor(PROMPT), max_new_tokens=3, do_sample=False, eos_token_id=None
        )
        assert answers[name]["made"] == made.tolist()
        assert answers[name]["layers"] == (1 if name == "both" else 2)
        assert "per_layer_config" not in (folders[name] / "config.json").read_text()
    assert "size" in answers["ragged"]["refused"], answers["ragged"]
    assert torch.isfinite(logits_of(load_dense(str(folders["ragged"]), "bfloat16"))).all(), (
        "with qpruner it runs"
    )


# ---- when it is run again


def digests(raw: Raw) -> tuple[str, str]:
    """Compute the digests of the prepare and the prune stage without running them."""
    config = validate_config(raw)
    inspection = preflight.inspect(config, packs=False)
    context = Context(
        config, RunDir(config.output, create=False), lambda event: None, None, inspection
    )
    prepared = Prepare(context).digest
    context.add_record("prepare", PrepareRecord.model_construct(digest=prepared))
    return prepared, Prune(context).digest


def test_only_a_key_of_prune_runs_it_again(raw: Raw) -> None:
    """Keys of later stages change no digest, and each key of `prune` gives another digest."""
    first, _, events = pruned(raw)
    assert stages(events) == {"prepare": True, "prune": True}
    assert stages(pruned(raw)[2]) == {"prepare": False, "prune": False}
    before = digests(raw)
    record = RunDir(raw["output"]).read_record("prune", PruneRecord)
    assert record
    assert before[1] == record.digest
    assert first.digest != before[1]
    later = {
        "lora.rank": 8,
        "quantize.budget.fraction": 0.75,
        "training.learning_rate": 0.5,
        "evaluate.limit": 4,
    }
    for key, value in later.items():
        assert digests(with_key(raw, key, value)) == before, key
    solved = {"compensation": "least_squares"}
    depth = {"units": ["block", "mlp"], "rate": 0.5, "depth_share": 0.8}
    others = [
        *(
            {"rate": 0.3},
            {"importance": "magnitude"},
            {"order": "second"},
            {"selection": "global"},
            {"round_to": 64},
        ),
        *(solved, solved | {"ridge": 0.1}, depth),
    ]
    found = [digests(changed(raw, **keys)) for keys in others]
    assert {prepared for prepared, _ in found} == {before[0]}
    assert len({before[1], *(cut for _, cut in found)}) == len(others) + 1
    assert digests(with_key(raw, "calibration.num_samples", 4))[0] != before[0]
    assert stages(pruned(changed(raw, round_to=64))[2]) == {"prepare": False, "prune": True}


def test_a_record_with_other_fields_is_made_again(raw: Raw) -> None:
    """The message names the likely reason: another version of qpruner wrote the record."""
    RunDir(raw["output"]).write_record("prune", pruned(raw)[0])
    events = pruned(raw)[2]
    assert stages(events)["prune"]
    assert any("an earlier version of qpruner wrote it" in f"{each}" for each in events)


# ---- calibration samples


def prepared_rows(raw: Raw, split: str) -> list[dict[str, list[int]]]:
    from qpruner.data.encoding import load_encoded

    return load_encoded(Path(raw["output"]) / "prepare" / "data" / split)


def test_importance_differentiates_the_loss_of_responses(raw: Raw) -> None:
    """Prompts have no labels, and packed samples have one length."""
    instructions = {"source": "package:qpruner/demo/data/instructions.jsonl", "split": "train[:48]"}
    raw = with_key(with_key(raw, "data.train", [instructions]), "calibration.packing", True)
    raw = with_key(with_key(raw, "data.max_length", 256), "calibration.max_length", 200)
    run(validate_config(raw), lambda event: None, until="prepare")
    rows = prepared_rows(raw, "importance")
    assert [len(row["input_ids"]) for row in rows] == [200] * 8
    shares = [sum(label != -100 for label in row["labels"]) / len(row["labels"]) for row in rows]
    assert 0 < max(shares) < 0.6, "the template and the instruction are the larger part"


def test_sensitivities_are_of_the_task_beside_calibration_text(raw: Raw) -> None:
    """Importance uses `calibration.data`, and sensitivities use the training rows."""
    text = {
        "source": "package:qpruner/demo/data/instructions.jsonl",
        "format": "text",
        "columns": {"text": "output"},
    }
    raw = with_key(with_key(raw, "calibration.data", [text]), "calibration.max_length", 50)
    run(validate_config(raw), lambda event: None, until="prepare")
    assert all(row["labels"] == row["input_ids"] for row in prepared_rows(raw, "importance"))
    train = {tuple(row["input_ids"]): row["labels"] for row in prepared_rows(raw, "train")}
    rows = prepared_rows(raw, "sensitivity")
    assert len(rows) == 32
    assert all(train[tuple(row["input_ids"])] == row["labels"] for row in rows), (
        "prompts without a label"
    )


# ---- the command


def test_the_command_ends_with_a_table_of_the_cuts(
    tiny_model: Path, tmp_path: Path, write_yaml: Callable[[Raw], Path]
) -> None:
    raw = raw_config(tiny_model, tmp_path / "run")
    done = command("prune", write_yaml(raw))
    assert done.exit_code == 0, done.output
    written = RunDir(raw["output"]).read_record("prune", PruneRecord)
    assert written
    record = written.cuts["cut-20"]
    lines = [re.split(" {2,}", line) for line in done.output.splitlines()]
    [told] = [cells for cells in lines if cells[0] == "20 % pruned"]
    assert told[1:3] == [f"{record.achieved_rate:.2%}", f"{record.parameters_after / 1e6:.1f} M"]
