"""`qpruner run CONFIG --plan FILE` as a user types it: a plan changed by hand becomes the model, without a search."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import raw_config, with_key
from real_driver import search_record

from qpruner.cli.main import main

ENDED = "only one plan was to be tried (`search.plan`, or a single `quantize.bits`)"
SEED, UNIFORM = 0, 1
"""The search's trials, in their order."""


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qpruner", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def qpruner(*arguments: object) -> str:
    """What a command that ends well says."""
    done = call(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def written(folder: Path, model: Path, **keys: Any) -> Path:
    raw = raw_config(model, folder / "run")
    for key, value in keys.items():
        raw = with_key(raw, key, value)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    return config


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run whose search of a seed plan and the uniform one is over."""
    keys = {"sensitivity.methods": ["first_order"], "search.max_trials": 2, "finetune.compare": False}
    config = written(tmp_path_factory.mktemp("given"), tiny_model, **keys)
    qpruner("search", config)
    return config


def comparison_rows(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "records" / "comparison.json").read_text())["candidates"])


def plan_file(config: Path, **changes: int) -> tuple[Path, dict[str, int]]:
    """The uniform trial's plan, changed by hand."""
    plan = yaml.safe_load(qpruner("plan", config.parent / "run", "--trial", UNIFORM)) | changes
    file = config.parent / f"plan-{len(list(config.parent.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump(plan))
    return file, plan


@pytest.mark.slow
def test_a_changed_plan_is_tuned_compared_and_forgotten(searched: Path) -> None:
    """It wins whatever the others scored, beside the best seed; without it the search's winner is back."""
    run = searched.parent / "run"
    before = search_record(run)
    file, changed = plan_file(searched, **{"layers.0.qkv": 8, "layers.1.o": 8})
    compared = ("--set", "finetune.compare=true", "--set", "finetune.seeds=1")
    told = qpruner("run", searched, "--plan", file, *compared, "--json")
    assert json.loads(told.splitlines()[-1])["best_plan"] == changed
    record = search_record(run)
    assert (record["num_trials"], record["best_origin"], record["ended"]) == (1, "given", ENDED)
    listed = json.loads(qpruner("trials", run, "--json"))["trials"]
    assert [(row["from"], row["search"]) for row in listed] == [
        ("seed-first-order", "another"), ("uniform-4", "another"), ("given", "this"),
    ]  # fmt: skip
    confirmed = {each["origin"]: each for each in record["confirmations"]}
    controls = [origin for origin, each in confirmed.items() if each["control"]]
    assert (controls, list(confirmed)) == (["seed-first-order", "uniform-4"], [*controls, "given"])
    best = min(controls, key=lambda origin: (confirmed[origin]["loss"], confirmed[origin]["index"]))
    assert record["best_control"] == confirmed[best]["index"], "a given plan is no control"
    [summary] = json.loads(qpruner("compare", run, "--json"))["runs"]
    assert summary["best_control"] == min(row["loss"] for row in listed if row["from"] in controls)
    tuned = {row["name"]: row for row in comparison_rows(run)}
    assert tuned["searched"]["plan"] == changed
    assert tuned["searched"]["origin"] == f"given, trial {record['best_index']}"
    assert tuned["best seed"]["origin"] == "seed-first-order at the winner's bytes"

    qpruner("search", searched, "--set", "search.confirm=9")
    again = search_record(run)
    assert again["num_reused"] >= 1 and again["confirmations"] == before["confirmations"]
    assert (again["best_plan"], again["best_origin"]) == (before["best_plan"], before["best_origin"])


@pytest.mark.slow
def test_a_plan_that_a_search_has_tried_is_not_tried_again(searched: Path) -> None:
    run = searched.parent / "run"
    before = {path: path.read_bytes() for path in run.glob(f"trials/*/{SEED:04}/trial.json")}
    file = searched.parent / "tried.json"
    file.write_text(qpruner("plan", run, "--trial", SEED, "--json"))
    qpruner("search", searched, "--plan", file)
    record = search_record(run)
    assert (record["num_trials"], record["best_index"], record["best_origin"]) == (0, SEED, "given")
    assert record["confirmations"][0]["origin"] == "seed-first-order", "the best seed may be itself"
    assert {path: path.read_bytes() for path in before} == before


# ---- a plan that the configuration gives without a file


@pytest.fixture(scope="module")
def uniform(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with one bit-width."""
    keys = {"quantize": {"group": "block", "bits": [4]}, "finetune.seeds": 1, "finetune.random_plans": 1}
    return written(tmp_path_factory.mktemp("uniform"), tiny_model, **keys)


METHODS = ("--set", "sensitivity.methods=[mutual_information]")
BY_INFORMATION = ("--set", "quantize.bits=[4, 8]", *METHODS, "--plan", "mutual_information")


def checked(*arguments: object) -> tuple[str, dict[str, Any]]:
    done = CliRunner().invoke(main, ["check", *map(str, arguments), "--json", "--gpu"])
    assert done.exit_code == 0, done.output
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_check_tells_of_a_plan_without_a_file(uniform: Path) -> None:
    said, facts = checked(uniform)
    assert "your plan:   every group at 4 bits, the only one of `quantize.bits`\n" in said
    assert "trials:      1, 1 at once" in said and "none for the sensitivities" in said
    assert facts["bytes_budget"] == facts["bytes_all_4"] and "sensitivity" not in facts["memory"]
    idle = "has no effect: `quantize.bits` is [4], so nothing is measured or searched"
    trials, methods = f"`search.max_trials` {idle}", f"`sensitivity.methods` {idle}"
    assert trials in facts["warnings"] and methods not in facts["warnings"]
    assert methods in checked(uniform, *METHODS)[1]["warnings"]
    said, facts = checked(uniform, *BY_INFORMATION)
    assert "your plan:   the seed plan of mutual_information, inside the budget" in said
    assert "trials:      1, 1 at once" in said and facts["bytes_plan"] is None


@pytest.mark.slow
def test_one_bit_width_runs_whole_without_a_search(uniform: Path) -> None:
    """The paper's first variant, with the comparisons that are left: the report has no sensitivities to show."""
    run = uniform.parent / "run"
    qpruner("run", uniform)
    record = search_record(run)
    assert record["best_plan"] == {"layers.0": 4, "layers.1": 4}
    assert (record["num_trials"], record["best_origin"], record["ended"]) == (1, "given", ENDED)
    assert json.loads((run / "records" / "sensitivity.json").read_text())["methods"] == {}
    rows = [row["name"] for row in comparison_rows(run)]
    assert rows == ["base", "pruned", "uniform 4-bit", "searched"], "there is no other plan to draw or to seed"
    assert "given plan (uniform-4)" in (run / "report.md").read_text()


@pytest.mark.slow
def test_the_seed_plan_of_a_sensitivity_is_taken(uniform: Path, tmp_path: Path) -> None:
    """The paper's second variant: bits by mutual information, and no search."""
    run = tmp_path / "run"
    qpruner("search", uniform, "--set", f"output={run}", *BY_INFORMATION)
    record = search_record(run)
    assert (record["num_trials"], record["best_origin"], record["ended"]) == (1, "given", ENDED)
    assert [each["origin"] for each in record["confirmations"]] == ["seed-mutual-information"]
    assert sorted(record["best_plan"].values()) == [4, 8], "half the bytes between all at 4 and all at 8"
