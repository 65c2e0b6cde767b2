"""`qpruner run` as a user types it: real Ray, real bitsandbytes, real lm-eval, on the two-layer model.

Also the promise that a run may be killed at any instant and repeated: same plans, same losses, same report.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import disk_of, raw_config, with_key

from qpruner.config.load import load_config
from qpruner.pipeline.run import SMALL_FILES, check, run
from qpruner.runs.events import Event, Message, StageSkipped
from qpruner.runs.records import RungResult
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob

MINUTES = 60.0
NOT_COMPARED = {
    *("seconds", "search_seconds", "gpu_seconds", "confirmation_gpu_seconds", "times", "begun", "sessions", "resumed"),
    *("peak_memory_bytes", "inference", "inference_memory_bytes"),
    *("prefill_tokens_per_second", "decode_tokens_per_second"),
    *("model_path", "output", "worker", "node", "checkpoint", "environment", "state", "standing", "record_digest"),
}
"""What may differ between two runs of one configuration: times, memory, folders, that it was resumed, and so digests of
whole records."""
TEST_QUESTIONS = {
    "source": "package:qpruner/demo/data/questions_test.jsonl",
    "format": "text",
    "columns": {"text": "question"},
}


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "qpruner", "run", str(config), "--json", *options]


def said(config: Path, *options: str, verb: str = "run") -> str:
    """What a command that ends well writes on its stdout."""
    line = [sys.executable, "-m", "qpruner", verb, str(config), *options]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=8 * MINUTES)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def comparable(value: Any) -> Any:
    """A result without what may differ."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in NOT_COMPARED}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def outcome(run: Path) -> dict[str, Any]:
    """The report's data, and the plan, rungs and end of every trial."""
    trials = [json.loads(path.read_text()) for path in sorted((run / "trials").glob("*/*/trial.json"))]
    report = json.loads((run / "results.json").read_text())
    return {"report": comparable(report), "trials": comparable(trials)}


def written_config(folder: Path, model: Path) -> Path:
    folder.mkdir(parents=True)
    raw = raw_config(model, folder / "run")
    for key, value in (
        ("search.max_concurrent", 1),  # then the order of results, and with it every proposal, is fixed
        ("search.max_trials", 3),  # two of them are controls
        ("sensitivity.methods", ["mutual_information"]),
        ("finetune.seeds", 1),
        ("evaluate.limit", 4),
        ("evaluate.text", [TEST_QUESTIONS]),
    ):
        raw = with_key(raw, key, value)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def is_ray_agent(process: psutil.Process) -> bool:
    """Ray's two agents notice their raylet's death by themselves, but only after up to 95 s (measured, Ray 2.60)."""
    try:
        return process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    except psutil.NoSuchProcess:
        return False


def kill_when(
    config: Path, condition: Callable[[], bool], number: signal.Signals = signal.SIGKILL, *options: str
) -> None:
    """Start a run, signal the driver once the condition holds, and wait until Ray's processes are gone."""
    driver = subprocess.Popen(command(config, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    descendants: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 4 * MINUTES
        while not condition():
            assert driver.poll() is None, "the run ended before the kill point was reached"
            assert time.monotonic() < deadline, "the kill point was not reached"
            time.sleep(0.02)
        descendants = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(number)
        driver.wait(timeout=MINUTES)
        _, alive = psutil.wait_procs([p for p in descendants if not is_ray_agent(p)], timeout=MINUTES)
        assert not alive, f"left over after the driver's death: {alive}"
    finally:
        for process in [*descendants, *([psutil.Process(driver.pid)] if driver.poll() is None else [])]:
            if process.is_running():
                process.kill()


@pytest.fixture(scope="module")
def ended(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run's folder and the JSON object on its last line of stdout."""
    config = written_config(tmp_path_factory.mktemp("undisturbed") / "a", tiny_model)
    return config.parent / "run", json.loads(said(config, "--json").splitlines()[-1])


@pytest.fixture
def undisturbed(ended: tuple[Path, dict[str, Any]]) -> Path:
    return ended[0]


def trials_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((root / "trials").glob("*/*/trial.json"))]


def has_claim(root: Path, claim: str) -> bool:
    """Whether report and model card have it, line by line."""
    pages = [(root / name).read_text() for name in ("report.md", "final/README.md")]
    return all(line in page for page in pages for line in claim.splitlines())


def test_whole_run_ends_in_the_table(ended: tuple[Path, dict[str, Any]]) -> None:
    root, told = ended
    report = json.loads((root / "results.json").read_text())
    table, records, claim = report["table"], report["records"], report["claim"]
    names = [row["name"] for row in table]
    uniform, seeds = ["uniform 4-bit", "uniform 8-bit"], ["mutual-information seed", "best seed"]
    # Beside all groups at 4 bits there may be no other plan of equal bytes.
    random = ["random"] if "random" in names or set(records["search"]["best_plan"].values()) != {4} else []
    assert names == ["base", "pruned", *uniform, *seeds, *random, "searched"]
    assert told["status"] == "ok" and told["claim"] == claim
    assert table[-1]["measured_bytes"] <= records["search"]["budget_bytes"]
    text = (root / "report.md").read_text()
    assert all(f"| {row['title']} |" in text for row in table)
    steps = [(row["name"], row["seed"]) for row in records["evaluate"]["rows"]]
    assert steps == [("base", None), ("pruned", None), ("searched", None), ("searched", 1)]
    assert f"| {table[-1]['title']} (no fine-tune) | " in text
    assert has_claim(root, claim)
    assert '<p class="standing">Finished.</p>' in (root / "report.html").read_text()
    for row in table:
        assert row["inference_memory_bytes"] >= row["measured_bytes"]
        assert 0 < row["decode_tokens_per_second"][1] < row["prefill_tokens_per_second"][0], "reading is faster"
        assert row["perplexity"] > 1
    assert "| decode tokens/s |" in text and "on `evaluate.text` in" in text
    candidates = records["comparison"]["candidates"]
    assert records["finetune"]["candidates"] == candidates[-1:], "the winner's is one and the same"
    assert all(row["measured_bytes"] == row["plan_bytes"] for row in candidates), "the formula is the packed tensors"
    assert {row["steps"] for row in candidates} == {4}, "every row had the same fine-tune"


def test_no_trial_is_over_budget_or_twice(undisturbed: Path) -> None:
    search, trials = json.loads((undisturbed / "records" / "search.json").read_text()), trials_of(undisturbed)
    plans = [tuple(trial["plan"].values()) for trial in trials]
    assert len(plans) == len(set(plans)) == search["num_trials"]
    assert all(trial["plan_bytes"] <= search["budget_bytes"] for trial in trials)
    controls = [trial for trial in trials if trial["origin"].startswith(("uniform-", "seed-"))]
    assert controls and all(trial["status"] == "finished" for trial in controls), "controls are exempt from ASHA"
    confirmed = {each["index"] for each in search["confirmations"]}
    assert {trial["index"] for trial in controls} <= confirmed, "and scored again on fresh rows with the finalists"


def test_final_folder_loads_in_plain_transformers(undisturbed: Path) -> None:
    code = (
        "import sys, qpruner.hf, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "kinds = {type(m).__name__ for m in model.modules()}\n"
        "assert {'Linear4bit', 'Int8Linear'} & kinds, kinds\n"
        "assert any('lora_A' in name for name, _ in model.named_parameters())\n"
        "ids = tokenizer('Question: What is ice?', return_tensors='pt')\n"
        "assert model.generate(**ids, max_new_tokens=4).shape[1] > ids['input_ids'].shape[1]\n"
    )
    subprocess.run([sys.executable, "-c", code, str(undisturbed / "final")], check=True, timeout=2 * MINUTES)


def test_files_are_as_large_as_told_and_as_readable_as_folders(undisturbed: Path) -> None:
    searched = json.loads((undisturbed / "results.json").read_text())["table"][-1]
    on_disk = sum(path.stat().st_size for path in (undisturbed / "final").glob("*.safetensors"))
    # Names and JSON headers weigh about 100 bytes a tensor, which shows on a model this small.
    headers = 100 * 9 * 14 + 100 * 28
    assert searched["measured_bytes"] * 0.99 <= on_disk <= searched["measured_bytes"] * 1.01 + headers
    private = [path for path in undisturbed.rglob("*") if 0o444 & path.parent.stat().st_mode & ~path.stat().st_mode]
    assert not private


def test_a_finished_run_asks_for_no_more_room(undisturbed: Path, tmp_path: Path) -> None:
    config = load_config(undisturbed.parent / "config.yaml", [f"output={tmp_path / 'disk' / 'run'}"])
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
    losses = [EventAccumulator(str(folder)).Reload().Scalars("validation/loss") for folder in ours.glob("trial-*")]
    assert sorted(map(len, losses)) == sorted(len(trial["rungs"]) for trial in trials_of(undisturbed))
    assert EventAccumulator(str(ours / "result")).Reload().Tags()["tensors"] == ["final table/text_summary"]


def test_repeating_a_finished_run_computes_nothing(undisturbed: Path) -> None:
    """Whatever its model card is told to state; what it lacks is said."""
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "records").iterdir()}
    shown = {path.name for path in (undisturbed / "tensorboard").iterdir()}
    shutil.rmtree(undisturbed / "tensorboard")
    lacking = "the model card does not state: base model, {}; set `card.base_model`, {} and repeat `qpruner run`"
    told = []
    for stated in ((), ("license=mit",), ("license=mit", "base_model=someone/base", "datasets=[]")):
        events: list[Event] = []
        config = load_config(undisturbed.parent / "config.yaml", [f"card.{key}" for key in stated])
        run(config, events.append)
        assert sum(isinstance(event, StageSkipped) for event in events) == 8
        texts = [event.text for event in events if isinstance(event, Message) and event.stage == "report"]
        told.append([text for text in texts if "the model card" in text])
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "records").iterdir()} == before
    assert {path.name for path in (undisturbed / "tensorboard").iterdir()} == shown, "made again from the records"
    (everything,), (less,), nothing = told
    assert everything.startswith(lacking.format("licence, datasets", "`card.license`, `card.datasets`"))
    assert less.startswith(lacking.format("datasets", "`card.datasets`"))
    assert not nothing
    card = (undisturbed / "final" / "README.md").read_text()
    assert "base_model: someone/base\n" in card and "license: mit\n" in card and "datasets: []\n" in card


def test_a_trial_alone_gives_the_losses_of_the_search(undisturbed: Path) -> None:
    """The last trial ran in an actor that others had used; without Ray, in another process, it is the same."""
    trial, threads = trials_of(undisturbed)[-1], torch.get_num_threads()
    materials = Materials(undisturbed / "prune", undisturbed / "bank", undisturbed / "prepare" / "data")
    rungs: list[RungResult] = []
    torch.set_num_threads(1)
    try:
        job = TrialJob(load_config(undisturbed.parent / "config.yaml"), materials, trial["plan"])
        run_trial(job, None, lambda rung, _: rungs.append(rung))
    finally:
        torch.set_num_threads(threads)
    alone = [json.loads(rung.model_dump_json()) for rung in rungs]
    assert alone[: len(trial["rungs"])] == trial["rungs"]


def test_killed_in_a_stage_and_repeated_gives_the_same(undisturbed: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = written_config(tmp_path / "killed", tiny_model)
    root = config.parent / "run"
    kill_when(config, (root / ".scratch-prune").exists)
    run(load_config(config), lambda event: None, until="prune")
    for stage in ("prepare", "prune"):
        records = [json.loads((each / "records" / f"{stage}.json").read_text()) for each in (root, undisturbed)]
        assert comparable(records[0]) == comparable(records[1])
    assert not list(root.glob(".scratch-*")), "nothing half-made is left"


def search_of(root: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The search's record, and the trials of its folder by number."""
    record = json.loads((root / "records" / "search.json").read_text())
    paths = (root / "trials" / record["trials_digest"]).glob("*/trial.json")
    trials = [json.loads(path.read_text()) for path in paths]
    return record, {trial["index"]: trial for trial in trials}


@pytest.mark.slow
def test_another_budget_starts_from_the_trials_there_are(undisturbed: Path, tmp_path: Path) -> None:
    """It measures and packs nothing."""
    root = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    first, before = search_of(root)
    other = ("quantize.budget={fraction: 0.8}", "search.searcher=random", "search.max_trials=3", f"output={root}")
    told = said(undisturbed.parent / "config.yaml", *(f"--set={key}" for key in other), verb="search")
    assert told.count("already recorded") == 4
    second, after = search_of(root)
    assert second["trials_digest"] == first["trials_digest"] and second["budget_bytes"] > first["budget_bytes"]
    assert (second["num_trials"], second["num_reused"]) == (3, len(before))
    assert second["ended"] == "all 3 trials were spent (`search.max_trials`)"
    assert {index: after[index] for index in before} == before, "what was taken over is as it was"
    assert len({tuple(trial["plan"].values()) for trial in after.values()}) == len(after) == len(before) + 3
    controls = {each["origin"]: each for each in second["confirmations"] if each["control"]}
    assert controls["uniform-4"]["reused"]
    losses = {each["index"]: each["loss"] for each in second["confirmations"]}
    assert losses[second["best_index"]] == min(losses.values())


def trial_is_between_rungs(root: Path, index: int) -> bool:
    for path in root.glob(f"trials/*/{index:04d}/trial.json"):
        trial = json.loads(path.read_text())
        return bool(trial["rungs"]) and trial["status"] == "running"
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_twice_and_repeated_gives_the_same(
    number: signal.Signals, undisturbed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Ctrl-C: Tune's own handler would end the search early and let it pass for a finished one."""
    config = written_config(tmp_path / "killed", tiny_model)
    root = config.parent / "run"
    kill_when(config, lambda: trial_is_between_rungs(root, 1), number)
    assert not (root / "records" / "search.json").exists()
    kill_when(config, lambda: len(list(root.glob("candidates/*/record.json"))) >= 2)
    said(config)
    assert outcome(root) == outcome(undisturbed)
    told = (root / "report.md").read_text()
    assert " Resumed: 2 sessions; the last began with 2 trials recorded before." in told
    assert "Finished; resumed 2 times after a command that did not come to its end." in told


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "prune", "sensitivity", "bank", "search", "finetune", "evaluate"])
def test_killed_inside_each_stage_gives_the_same(
    stage: str, undisturbed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = written_config(tmp_path / "killed", tiny_model)
    root = config.parent / "run"
    kill_when(config, (root / f".scratch-{stage}").exists)
    said(config)
    assert outcome(root) == outcome(undisturbed)
    assert not list(root.glob(".scratch-*")), "nothing half-made is left"


@pytest.mark.slow
def test_a_comparison_is_added_to_a_finished_run(undisturbed: Path, tiny_model: Path, tmp_path: Path) -> None:
    """And may be killed: what the winner has is there before, stays meanwhile, and is not made again."""
    config = written_config(tmp_path / "added", tiny_model)
    root, compared = config.parent / "run", ("--set", "finetune.compare=true")

    def written() -> dict[Path, int]:
        paths = (*(root / "records").iterdir(), root / "final" / "config.json")
        return {path: path.stat().st_mtime_ns for path in paths}

    def table() -> list[str]:
        return [row["name"] for row in json.loads((root / "results.json").read_text())["table"]]

    assert "--set finetune.compare=true" in said(config, "--set", "finetune.compare=false")
    before = written()
    search, trials = search_of(root)
    assert {each["index"] for each in search["confirmations"] if each["control"]} == {
        index for index, trial in trials.items() if trial["origin"].startswith(("uniform-", "seed-"))
    }, "controls are trials, and scored on fresh rows, also where nothing is compared after a fine-tune"
    assert table() == ["searched"] and len(list(root.glob("candidates/*/record.json"))) == 1
    kill_when(config, lambda: len(list(root.glob("candidates/*/record.json"))) >= 3, signal.SIGKILL, *compared)
    assert table() == ["searched"] and written() == before
    page = (root / "report.html").read_text()
    assert "The winner is finished, its comparison is not. Unfinished in stage comparison: " in page
    claim = json.loads((root / "results.json").read_text())["claim"]
    assert has_claim(root, claim)

    told = said(config, *compared)
    assert told.count("already recorded") == 7
    title = json.loads((root / "results.json").read_text())["table"][-1]["title"]
    assert f"[comparison] {title}, training seed 1: " not in told, "it is neither trained nor scored again"
    assert {path: time for path, time in written().items() if path in before} == before
    assert outcome(root) == outcome(undisturbed)
    before = written()
    assert said(config, *compared).count("already recorded") == 8 and written() == before
