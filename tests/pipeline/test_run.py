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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import disk_of, raw_config, with_key

from qpruner.config.load import load_config
from qpruner.pipeline.disk import SMALL_FILES
from qpruner.pipeline.run import check

MINUTES = 60.0
NOT_COMPARED = {
    "seconds",
    "search_seconds",
    "gpu_seconds",
    "confirmation_gpu_seconds",
    "peak_memory_bytes",
    "model_path",
    "output",
    "resumed",
    "standing",
    "sessions",
    "worker",
    "node",
    "checkpoint",
    "environment",
    "state",
    "times",
    "inference",
    "inference_memory_bytes",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "begun",
    "record_digest",
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
    # One trial at a time: then the order of results, and with it every proposal, is fixed.
    raw = with_key(raw_config(model, folder / "run"), "search.max_concurrent", 1)
    # The controls are three of the five trials.
    raw = with_key(raw, "sensitivity.methods", ["mutual_information", "first_order"])
    raw = with_key(raw, "finetune.seeds", 1)
    raw = with_key(raw, "evaluate.text", [TEST_QUESTIONS])
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
    config: Path, condition: Callable[[], bool], number: signal.Signals = signal.SIGKILL, options: tuple[str, ...] = ()
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
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A finished run's folder and the JSON object on its last line of stdout."""
    config = written_config(tmp_path_factory.mktemp("undisturbed") / "a", tiny_model)
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=8 * MINUTES)
    assert done.returncode == 0, done.stderr[-3000:]
    return config.parent / "run", json.loads(done.stdout.splitlines()[-1])


def test_whole_run_ends_in_the_table(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    run, told = undisturbed
    report = json.loads((run / "results.json").read_text())
    names = [row["name"] for row in report["table"]]
    uniform, seeds = ["uniform 4-bit", "uniform 8-bit"], ["mutual-information seed", "best seed"]
    # Beside all groups at 4 bits there may be no other plan of equal bytes.
    random = ["random"] if "random" in names or set(report["records"]["search"]["best_plan"].values()) != {4} else []
    assert names == ["base", "pruned", *uniform, *seeds, *random, "searched"]
    assert told["status"] == "ok"
    assert told["claim"] == report["claim"]
    assert {row["name"]: row["measured_bytes"] for row in told["table"]}["searched"] <= report["records"]["search"][
        "budget_bytes"
    ]
    text = (run / "report.md").read_text()
    titles = [row["title"] for row in report["table"]]
    assert all(f"| {title} |" in text for title in titles)
    steps = [(row["name"], row["seed"]) for row in report["records"]["evaluate"]["rows"]]
    assert steps == [("base", None), ("pruned", None), ("searched", None), ("searched", 1)]
    assert f"| {titles[-1]} (no fine-tune) | " in text
    assert report["claim"] in text
    assert '<p class="standing">Finished.</p>' in (run / "report.html").read_text()
    assert report["claim"] in (run / "final" / "README.md").read_text()
    for row in report["table"]:
        assert row["inference_memory_bytes"] >= row["measured_bytes"]
        assert 0 < row["decode_tokens_per_second"][1] < row["prefill_tokens_per_second"][0], "reading is faster"
        assert row["perplexity"] > 1
    assert "| decode tokens/s |" in text and "on `evaluate.text` in" in text
    candidates = report["records"]["comparison"]["candidates"]
    assert report["records"]["finetune"]["candidates"] == candidates[-1:], "the winner's is one and the same"
    assert all(row["measured_bytes"] == row["plan_bytes"] for row in candidates), "the formula is the packed tensors"
    # Every row had the same fine-tune.
    assert {row["steps"] for row in candidates} == {4}


def test_no_trial_is_over_budget_or_twice(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    run, _ = undisturbed
    search = json.loads((run / "results.json").read_text())["records"]["search"]
    trials = [json.loads(path.read_text()) for path in sorted((run / "trials").glob("*/*/trial.json"))]
    plans = [tuple(trial["plan"].values()) for trial in trials]
    assert len(plans) == len(set(plans)) == search["num_trials"]
    assert all(trial["plan_bytes"] <= search["budget_bytes"] for trial in trials)
    controls = [trial for trial in trials if trial["origin"].startswith(("uniform-", "seed-"))]
    assert controls
    assert all(trial["status"] == "finished" for trial in controls), "controls are exempt from ASHA"
    assert {trial["index"] for trial in controls} <= {each["index"] for each in search["confirmations"]}, (
        "and are scored again on fresh rows with the finalists"
    )


def test_final_folder_loads_in_plain_transformers(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    run, _ = undisturbed
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
    subprocess.run([sys.executable, "-c", code, str(run / "final")], check=True, timeout=2 * MINUTES)


def test_bytes_on_disk_are_the_bytes_told(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    run, _ = undisturbed
    searched = json.loads((run / "results.json").read_text())["table"][-1]
    on_disk = sum(path.stat().st_size for path in (run / "final").glob("*.safetensors"))
    # Names and JSON headers weigh about 100 bytes a tensor, which shows on a model this small.
    headers = 100 * 9 * 14 + 100 * 28
    assert searched["measured_bytes"] * 0.99 <= on_disk <= searched["measured_bytes"] * 1.01 + headers


def test_a_finished_run_asks_for_no_more_room(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = undisturbed
    (file,) = run.parent.glob("*.yaml")
    config = load_config(file, [f"output={tmp_path / 'disk' / 'run'}"])
    with disk_of("64m", tmp_path / "disk") as disk:
        shutil.copytree(run, disk / "run")
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - SMALL_FILES - 8192)
        check(config, lambda event: None)


def test_who_may_read_a_folder_of_the_run_may_read_its_files(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    run, _ = undisturbed
    private = [path for path in run.rglob("*") if 0o444 & path.parent.stat().st_mode & ~path.stat().st_mode]
    assert not private


def test_tensorboard_finds_every_trial_once_and_no_other_runs(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _told = undisturbed
    folders = {path.parent for path in run.rglob("*tfevents*")}
    ours, trials = run / "tensorboard", list((run / "trials").glob("*/*/trial.json"))
    assert {folder.parent for folder in folders} == {ours}
    losses = [EventAccumulator(str(folder)).Reload().Scalars("validation/loss") for folder in ours.glob("trial-*")]
    reached = [len(json.loads(path.read_text())["rungs"]) for path in trials]
    assert sorted(map(len, losses)) == sorted(reached)
    assert EventAccumulator(str(ours / "result")).Reload().Tags()["tensors"] == ["final table/text_summary"]


def test_repeating_a_finished_run_computes_nothing(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    run, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in (run / "records").iterdir()}
    shown = {path.name for path in (run / "tensorboard").iterdir()}
    shutil.rmtree(run / "tensorboard")
    done = subprocess.run(command(run.parent / "config.yaml"), capture_output=True, text=True, timeout=2 * MINUTES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("already recorded") == 8
    assert {path: path.stat().st_mtime_ns for path in (run / "records").iterdir()} == before
    assert {path.name for path in (run / "tensorboard").iterdir()} == shown, "made again from the records"


def test_what_a_card_does_not_state_is_said_and_stated_without_computing_anything(
    undisturbed: tuple[Path, dict[str, Any]],
) -> None:
    run, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in (run / "records").iterdir()}
    repeated = command(run.parent / "config.yaml")
    lacking = (
        "[report] the model card does not state: base model, {}; set `card.base_model`, {} and repeat `qpruner run`"
    )
    told = []
    for stated in ((), ("license=mit",), ("license=mit", "base_model=someone/base", "datasets=[]")):
        options = [f"--set=card.{key}" for key in stated]
        done = subprocess.run([*repeated, *options], capture_output=True, text=True, timeout=2 * MINUTES)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("already recorded") == 8
        told.append([line for line in done.stdout.splitlines() if "the model card" in line])
    assert {path: path.stat().st_mtime_ns for path in (run / "records").iterdir()} == before
    (everything,), (less,), nothing = told
    assert everything.startswith(lacking.format("licence, datasets", "`card.license`, `card.datasets`"))
    assert less.startswith(lacking.format("datasets", "`card.datasets`"))
    assert not nothing
    card = (run / "final" / "README.md").read_text()
    assert "base_model: someone/base\n" in card and "license: mit\n" in card and "datasets: []\n" in card


@pytest.mark.slow
def test_another_budget_measures_and_packs_nothing_and_starts_from_the_trials_there_are(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    first, before = search_of(run)
    config = undisturbed[0].parent / "config.yaml"
    other = ("quantize.budget={fraction: 0.8}", "search.searcher=random", "search.max_trials=3", f"output={run}")
    verb = [sys.executable, "-m", "qpruner", "search", str(config), *(f"--set={key}" for key in other)]
    done = subprocess.run(verb, capture_output=True, text=True, timeout=4 * MINUTES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("already recorded") == 4
    second, after = search_of(run)
    assert second["trials_digest"] == first["trials_digest"] and second["budget_bytes"] > first["budget_bytes"]
    assert (second["num_trials"], second["num_reused"]) == (3, len(before))
    assert second["ended"] == "all 3 trials were spent (`search.max_trials`)"
    assert {index: after[index] for index in before} == before, "what was taken over is as it was"
    assert len({tuple(trial["plan"].values()) for trial in after.values()}) == len(after) == len(before) + 3
    controls = {each["origin"]: each for each in second["confirmations"] if each["control"]}
    assert controls["uniform-4"]["reused"] and controls["uniform-4"]["index"] == 0
    losses = {each["index"]: each["loss"] for each in second["confirmations"]}
    assert losses[second["best_index"]] == min(losses.values())


def search_of(run: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The search's record, and the trials of its folder by number."""
    record = json.loads((run / "records" / "search.json").read_text())
    paths = (run / "trials" / record["trials_digest"]).glob("*/trial.json")
    trials = [json.loads(path.read_text()) for path in paths]
    return record, {trial["index"]: trial for trial in trials}


TRIAL_ALONE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qpruner.config.load import load_config
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob
run, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
materials = Materials(run / "prune", run / "bank", run / "prepare" / "data")
rungs = []
run_trial(TrialJob(load_config(run.parent / "config.yaml"), materials, plan), None, lambda rung, _: rungs.append(rung))
print(json.dumps([rung.model_dump() for rung in rungs]))
"""


def test_a_trial_alone_gives_the_losses_of_the_search(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    """The last trial ran in an actor that others had used; without Ray, in a fresh process, it is the same."""
    run, _ = undisturbed
    trial = json.loads(sorted((run / "trials").glob("*/*/trial.json"))[-1].read_text())
    done = subprocess.run(
        [sys.executable, "-c", TRIAL_ALONE, str(run), json.dumps(trial["plan"])],
        capture_output=True,
        text=True,
        timeout=2 * MINUTES,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = json.loads(done.stdout.splitlines()[-1])
    assert alone[: len(trial["rungs"])] == trial["rungs"]


def trial_is_between_rungs(run: Path, index: int) -> bool:
    for path in run.glob(f"trials/*/{index:04d}/trial.json"):
        trial = json.loads(path.read_text())
        return bool(trial["rungs"]) and trial["status"] == "running"
    return False


@pytest.mark.slow
def test_killed_twice_and_repeated_gives_the_same(
    undisturbed: tuple[Path, dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    config = written_config(tmp_path / "killed", tiny_model)
    run = config.parent / "run"
    kill_when(config, lambda: trial_is_between_rungs(run, 1))
    kill_when(config, lambda: len(list(run.glob("candidates/*/record.json"))) >= 2)
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=8 * MINUTES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(run) == outcome(undisturbed[0])
    told = (run / "report.md").read_text()
    assert " Resumed: 2 sessions; the last began with 2 trials recorded before." in told
    assert "Finished; resumed 2 times after a command that did not come to its end." in told


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "prune", "sensitivity", "bank", "search", "finetune", "evaluate"])
def test_killed_inside_each_stage_gives_the_same(
    stage: str, undisturbed: tuple[Path, dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    config = written_config(tmp_path / "killed", tiny_model)
    run = config.parent / "run"
    kill_when(config, lambda: (run / f".scratch-{stage}").exists())
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=8 * MINUTES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(run) == outcome(undisturbed[0])
    assert not list(run.glob(".scratch-*")), "nothing half-made is left"


@pytest.mark.slow
def test_a_comparison_is_added_to_a_finished_run_and_may_be_killed(
    undisturbed: tuple[Path, dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    """What the winner has is there before, stays meanwhile, and is not made again."""
    config = written_config(tmp_path / "added", tiny_model)
    run, compared = config.parent / "run", ("--set", "finetune.compare=true")

    def done(*options: str) -> str:
        ended = subprocess.run(command(config, *options), capture_output=True, text=True, timeout=8 * MINUTES)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return ended.stdout

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (*(run / "records").iterdir(), run / "final" / "config.json")}

    def table() -> list[str]:
        return [row["name"] for row in json.loads((run / "results.json").read_text())["table"]]

    assert "--set finetune.compare=true" in done("--set", "finetune.compare=false")
    before = written()
    search, trials = search_of(run)
    assert {each["index"] for each in search["confirmations"] if each["control"]} == {
        index for index, trial in trials.items() if trial["origin"].startswith(("uniform-", "seed-"))
    }, "controls are trials, and scored on fresh rows, also where nothing is compared after a fine-tune"
    assert table() == ["searched"] and len(list(run.glob("candidates/*/record.json"))) == 1
    kill_when(config, lambda: len(list(run.glob("candidates/*/record.json"))) >= 3, options=compared)
    assert table() == ["searched"] and written() == before
    page = (run / "report.html").read_text()
    assert "The winner is finished, its comparison is not. Unfinished in stage comparison: " in page
    claim = json.loads((run / "results.json").read_text())["claim"]
    assert claim in (run / "report.md").read_text() and claim in (run / "final" / "README.md").read_text()

    told = done(*compared)
    assert told.count("already recorded") == 7
    title = json.loads((run / "results.json").read_text())["table"][-1]["title"]
    assert f"[comparison] {title}, training seed 1: " not in told, "it is neither trained nor scored again"
    assert {path: time for path, time in written().items() if path in before} == before
    assert outcome(run) == outcome(undisturbed[0])
    before = written()
    assert done(*compared).count("already recorded") == 8 and written() == before


@pytest.mark.slow
def test_interrupted_in_the_search_and_repeated_gives_the_same(
    undisturbed: tuple[Path, dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    """Ctrl-C: Tune's own handler would end the search early and let it pass for a finished one."""
    config = written_config(tmp_path / "interrupted", tiny_model)
    run = config.parent / "run"
    kill_when(config, lambda: trial_is_between_rungs(run, 1), signal.SIGINT)
    assert not (run / "records" / "search.json").exists()
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=8 * MINUTES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(run) == outcome(undisturbed[0])
