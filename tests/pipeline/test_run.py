"""A whole `qpruner run` on the two-layer model with real Ray, bitsandbytes and lm-eval."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import disk_of
from mixed_models import bank_of_run
from plain_transformers import run_python
from real_driver import search_record, trials_of
from whole_runs import has_claim

from qpruner.config.load import load_config
from qpruner.pipeline.run import SMALL_FILES, check, run
from qpruner.runs.events import Event, Message, StageSkipped
from qpruner.runs.records import RungResult, is_control
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob


def test_whole_run_ends_in_the_table(ended: tuple[Path, dict[str, Any]]) -> None:
    root, told = ended
    report = json.loads((root / "results.json").read_text())
    table = report["table"]
    records = report["records"]
    claim = report["claim"]
    names = [row["name"] for row in table]
    controls = [
        "unpruned-uniform",
        "unpruned-knapsack",
        "cut-20-uniform",
        "cut-20-knapsack",
        "paper",
    ]
    finalists = records["search"]["finalists"]
    confirmed = {each["fine_tunes"][0]["origin"]: each for each in finalists}
    losses = {
        name: each["fine_tunes"][0]["losses"]["selection"]["mean"]
        for name, each in confirmed.items()
    }
    tuned = [name for name in controls if name in names]
    left_out = confirmed.keys() & {*controls} - {*tuned}
    [winner] = [
        name for name, each in confirmed.items() if each["index"] == records["search"]["best_index"]
    ]
    assert "paper" in tuned, "however bad it is"
    assert all(losses[name] > losses[winner] for name in left_out), (
        "only controls that the winner beat"
    )
    is_control = {finalist["index"]: finalist["control"] for finalist in confirmed.values()}
    rival = ["best searched"] if is_control[records["search"]["best_index"]] else []
    # An unpruned winner has no random plans; beside all groups in nf4 there may be no other plan of
    # equal bytes.
    random = ["random"] if "random" in names else []
    pruned = ["pruned"] if table[-1]["cut"] != "base" else []
    assert names == ["base", *pruned, *tuned, *rival, *random, "searched"]
    instead = [name for name, each in confirmed.items() if each["control"]]
    assert {"unpruned-uniform", "cut-20-knapsack"} <= set(instead)
    assert told["status"] == "ok"
    assert told["claim"] == claim
    assert table[-1]["measured_bytes"] <= records["search"]["budget_bytes"]
    text = (root / "report.md").read_text()
    assert all(f"| {row['title']} |" in text for row in table)
    folders = [path for path in root.iterdir() if path.is_dir()]
    assert all(any(path.iterdir()) for path in folders), folders
    steps = [(row["name"], row["seed"]) for row in records["evaluate"]["rows"]]
    assert steps == [*((name, None) for name in ("base", *pruned, "searched")), ("searched", 1)]
    assert f"| {table[-1]['title']} (no fine-tune) | " in text
    assert has_claim(root, claim)
    assert '<p class="standing">Finished.</p>' in (root / "report.html").read_text()
    for row in table:
        assert row["inference_memory_bytes"] >= row["measured_bytes"]
        assert 0 < row["decode_tokens_per_second"][1] < row["prefill_tokens_per_second"][0], (
            "reading is faster"
        )
        assert row["perplexity"] > 1
    assert "| decode tokens/s |" in text
    assert "on `evaluate.text`" in text
    rows = records["comparison"]["rows"]
    winner = records["finetune"]["winner"]
    training = ("digest", "seed", "plan", "losses", "trained_sha256", "seconds", "gpu_seconds")
    assert all(rows[-1][key] == winner[key] for key in training), "it is one and the same"
    assert rows[-1] == records["evaluate"]["rows"][-1] | {"inference": rows[-1]["inference"]}
    assert all(row["measured_bytes"] == row["plan_bytes"] for row in rows), (
        "the formula is the packed tensors"
    )
    assert {row["steps"] for row in rows} == {4}, "every row had the same fine-tune"


def test_no_trial_is_over_budget_or_twice(undisturbed: Path) -> None:
    search = search_record(undisturbed)
    trials = trials_of(undisturbed).values()
    plans = [(trial["cut"], *trial["plan"].values()) for trial in trials]
    assert len(plans) == len(set(plans)) == search["num_trials"]
    fits = [trial for trial in trials if not trial["origin"].startswith(("unpruned-", "paper"))]
    assert all(trial["plan_bytes"] <= search["budget_bytes"] for trial in fits)
    controls = [trial for trial in trials if is_control(trial["origin"])]
    assert controls
    assert all(trial["status"] == "finished" for trial in controls), "controls are exempt from ASHA"
    confirmed = {each["index"] for each in search["finalists"]}
    assert {trial["index"] for trial in controls} <= confirmed, (
        "and scored again on fresh rows with the finalists"
    )


def test_final_folder_loads_in_plain_transformers(undisturbed: Path) -> None:
    code = (
        "import sys, qpruner.hf\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "kinds = {type(m).__name__ for m in model.modules()}\n"
        "assert {'Linear4bit', 'PackedLinear'} & kinds, kinds\n"
        "assert any('lora_A' in name for name, _ in model.named_parameters())\n"
        "ids = tokenizer('Question: What is ice?', return_tensors='pt')\n"
        "assert model.generate(**ids, max_new_tokens=4).shape[1] > ids['input_ids'].shape[1]\n"
    )
    run_python(code, str(undisturbed / "final"))


def test_files_have_the_reported_size_and_are_readable(undisturbed: Path) -> None:
    searched = json.loads((undisturbed / "results.json").read_text())["table"][-1]
    on_disk = sum(path.stat().st_size for path in (undisturbed / "final").glob("*.safetensors"))
    # Names and JSON headers weigh about 100 bytes a tensor, which shows on a model this small.
    headers = 100 * 9 * 14 + 100 * 28
    assert (
        searched["measured_bytes"] * 0.99 <= on_disk <= searched["measured_bytes"] * 1.01 + headers
    )
    private = [
        path
        for path in undisturbed.rglob("*")
        if 0o444 & path.parent.stat().st_mode & ~path.stat().st_mode
    ]
    assert not private


def test_a_finished_run_asks_for_no_more_room(undisturbed: Path, tmp_path: Path) -> None:
    config = load_config(
        undisturbed.parent / "config.yaml", [f"output={tmp_path / 'disk' / 'run'}"]
    )
    with disk_of("64m", tmp_path / "disk") as disk:
        shutil.copytree(undisturbed, disk / "run")
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - SMALL_FILES - 8192)
        check(config, lambda event: None)


def test_tensorboard_finds_every_trial_once(undisturbed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in undisturbed.rglob("*tfevents*")}
    ours = undisturbed / "tensorboard"
    assert {folder.parent for folder in folders} == {ours}
    losses = [
        EventAccumulator(str(folder)).Reload().Scalars("validation/loss")
        for folder in ours.glob("trial-*")
    ]
    assert sorted(map(len, losses)) == sorted(
        len(trial["rungs"]) for trial in trials_of(undisturbed).values()
    )


def test_repeating_a_finished_run_computes_nothing(undisturbed: Path) -> None:
    """Keys of `card` change the model card only, and missing keys are reported."""
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "records").iterdir()}
    shown = {path.name for path in (undisturbed / "tensorboard").iterdir()}
    shutil.rmtree(undisturbed / "tensorboard")
    lacking = (
        "the model card does not state: base model, {}; "
        "set `card.base_model`, {} and repeat `qpruner run`"
    )
    told = []
    for stated in ((), ("license=mit",), ("license=mit", "base_model=someone/base", "datasets=[]")):
        events: list[Event] = []
        config = load_config(undisturbed.parent / "config.yaml", [f"card.{key}" for key in stated])
        run(config, events.append)
        assert sum(isinstance(event, StageSkipped) for event in events) == 8
        texts = [
            event.text for event in events if isinstance(event, Message) and event.stage == "report"
        ]
        told.append([text for text in texts if "the model card" in text])
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "records").iterdir()} == before
    assert {path.name for path in (undisturbed / "tensorboard").iterdir()} == shown, (
        "made again from the records"
    )
    (everything,), (less,), nothing = told
    assert everything.startswith(
        lacking.format("licence, datasets", "`card.license`, `card.datasets`")
    )
    assert less.startswith(lacking.format("datasets", "`card.datasets`"))
    assert not nothing
    card = (undisturbed / "final" / "README.md").read_text()
    assert "base_model: someone/base\n" in card
    assert "license: mit\n" in card
    assert "datasets: []\n" in card


def test_a_trial_alone_gives_the_losses_of_the_search(undisturbed: Path) -> None:
    """A trial without Ray gives the losses of the same trial in an actor that earlier trials had
    used."""
    *_, trial = (trial for trial in trials_of(undisturbed).values() if trial["cut"] == "cut-20")
    threads = torch.get_num_threads()
    rungs: list[RungResult] = []
    torch.set_num_threads(1)
    try:
        config = load_config(undisturbed.parent / "config.yaml")
        materials = Materials({"cut-20": bank_of_run(config)}, undisturbed / "prepare" / "data")
        job = TrialJob(config, materials, trial["plan"], "cut-20")
        run_trial(job, None, lambda rung, _: rungs.append(rung))
    finally:
        torch.set_num_threads(threads)
    alone = [json.loads(rung.model_dump_json()) for rung in rungs]
    assert alone[: len(trial["rungs"])] == trial["rungs"]
