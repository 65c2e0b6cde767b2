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

from qpruner.cli.main import main

ENDED = "only one plan was to be tried (`search.plan`, or a single `quantize.bits`)"
SEED, UNIFORM = 0, 1
"""The search's trials, in their order."""


def qpruner(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qpruner", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def search_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "records" / "search.json").read_text()))


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run whose search of a seed plan and the uniform one is over."""
    folder = tmp_path_factory.mktemp("given")
    raw = with_key(raw_config(tiny_model, folder / "run"), "sensitivity.methods", ["first_order"])
    raw = with_key(with_key(raw, "search.max_trials", 2), "finetune.compare", False)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    done = qpruner("search", config)
    assert done.returncode == 0, done.stderr[-3000:]
    return config


@pytest.mark.slow
def test_a_plan_changed_by_hand_is_tried_and_fine_tuned(searched: Path) -> None:
    run = searched.parent / "run"
    printed = yaml.safe_load(qpruner("plan", run, "--trial", UNIFORM).stdout)
    changed = {**printed, "layers.0.qkv": 8, "layers.1.o": 8}
    file = searched.parent / "plan.yaml"
    file.write_text(yaml.safe_dump(changed))
    done = qpruner("finetune", searched, "--plan", file, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["best_plan"] == changed
    record = search_of(run)
    assert (record["num_trials"], record["best_origin"], record["ended"]) == (
        1,
        "given",
        ENDED,
    )
    [tuned] = json.loads((run / "records" / "finetune.json").read_text())["candidates"]
    assert tuned["plan"] == changed
    listed = json.loads(qpruner("trials", run, "--json").stdout)["trials"]
    assert [(row["from"], row["search"]) for row in listed] == [
        ("seed-first-order", "another"), ("uniform-4", "another"), ("given", "this"),
    ]  # fmt: skip


@pytest.mark.slow
def test_without_a_given_plan_the_winner_is_back(searched: Path) -> None:
    """However good that plan was: it is not what a search found."""
    run = searched.parent / "run"
    assert qpruner("search", searched).returncode == 0
    before = search_of(run)
    file = searched.parent / "largest.yaml"
    plan = yaml.safe_load(qpruner("plan", run, "--trial", UNIFORM).stdout)
    file.write_text(yaml.safe_dump({**plan, "layers.0.down": 8, "layers.1.down": 8}))
    assert qpruner("search", searched, "--plan", file).returncode == 0
    assert search_of(run)["best_origin"] == "given"
    done = qpruner("search", searched, "--set", "search.confirm=9")
    assert done.returncode == 0, done.stderr[-3000:]
    again = search_of(run)
    assert again["num_reused"] >= 1 and again["confirmations"] == before["confirmations"]
    assert (again["best_plan"], again["best_origin"]) == (before["best_plan"], before["best_origin"])


@pytest.mark.slow
def test_a_given_plan_is_compared_with_the_best_seed(searched: Path) -> None:
    run = searched.parent / "run"
    changed = {**yaml.safe_load(qpruner("plan", run, "--trial", UNIFORM).stdout), "layers.0.o": 8}
    file = searched.parent / "compared.yaml"
    file.write_text(yaml.safe_dump(changed))
    compared = ("--set", "finetune.compare=true", "--set", "finetune.seeds=1")
    done = qpruner("run", searched, "--plan", file, *compared)
    assert done.returncode == 0, done.stderr[-3000:]
    record = search_of(run)
    assert record["best_plan"] == changed and record["best_origin"] == "given", "whatever the others scored"
    confirmed = {each["origin"]: each for each in record["confirmations"]}
    controls = [origin for origin, each in confirmed.items() if each["control"]]
    assert (controls, list(confirmed)) == (["seed-first-order", "uniform-4"], [*controls, "given"])
    best = min(controls, key=lambda origin: (confirmed[origin]["loss"], confirmed[origin]["index"]))
    assert record["best_control"] == confirmed[best]["index"], "a given plan is no control"
    [told] = json.loads(qpruner("compare", run, "--json").stdout)["runs"]
    losses = {row["from"]: row["loss"] for row in json.loads(qpruner("trials", run, "--json").stdout)["trials"]}
    assert told["best_control"] == min(losses[origin] for origin in controls)
    tuned = json.loads((run / "records" / "comparison.json").read_text())["candidates"]
    origins = {row["name"]: row["origin"] for row in tuned}
    assert origins["best seed"] == "seed-first-order at the winner's bytes"
    assert origins["searched"] == f"given, trial {record['best_index']}"


@pytest.mark.slow
def test_a_plan_that_a_search_has_tried_is_not_tried_again(searched: Path) -> None:
    run = searched.parent / "run"
    before = {path: path.read_bytes() for path in run.glob(f"trials/*/{SEED:04}/trial.json")}
    file = searched.parent / "tried.json"
    file.write_text(qpruner("plan", run, "--trial", SEED, "--json").stdout)
    done = qpruner("search", searched, "--plan", file)
    assert done.returncode == 0, done.stderr[-3000:]
    record = search_of(run)
    assert (record["num_trials"], record["best_index"], record["best_origin"]) == (0, SEED, "given")
    assert record["confirmations"][0]["origin"] == "seed-first-order", "the best seed may be itself"
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_check_sizes_a_plan_and_refuses_what_run_does(searched: Path) -> None:
    plan = yaml.safe_load(qpruner("plan", searched.parent / "run", "--trial", UNIFORM).stdout)
    file = searched.parent / "checked.yaml"
    file.write_text(yaml.safe_dump(dict.fromkeys(plan, 4)))
    done = qpruner("check", searched, "--plan", file, "--json")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["bytes_plan"] == facts["bytes_all_4"]
    assert "your plan:  " in done.stdout and "left of the budget" in done.stdout
    file.write_text(yaml.safe_dump(dict.fromkeys(plan, 8)))
    refused = [qpruner(verb, searched, "--plan", file) for verb in ("check", "search")]
    assert [each.returncode for each in refused] == [2, 2]
    assert refused[0].stderr.endswith(f" ...\n{refused[1].stderr}"), "after the line that tells what it does"


# ---- a plan that the configuration gives without a file


@pytest.fixture(scope="module")
def uniform(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with one bit-width."""
    folder = tmp_path_factory.mktemp("uniform")
    raw = with_key(raw_config(tiny_model, folder / "run"), "quantize", {"group": "block", "bits": [4]})
    for key, value in {"finetune.seeds": 1, "finetune.random_plans": 1}.items():
        raw = with_key(raw, key, value)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    return config


METHODS = ("--set", "sensitivity.methods=[mutual_information]")
BY_INFORMATION = ("--set", "quantize.bits=[4, 8]", *METHODS, "--plan", "mutual_information")


def checked(*arguments: object) -> tuple[str, dict[str, Any]]:
    done = CliRunner().invoke(main, ["check", *map(str, arguments), "--json", "--gpu"])
    assert done.exit_code == 0, done.output
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_check_tells_of_one_bit_width(uniform: Path) -> None:
    said, facts = checked(uniform)
    assert "your plan:   every group at 4 bits, the only one of `quantize.bits`\n" in said
    assert "trials:      1, 1 at once" in said and "none for the sensitivities" in said
    assert facts["bytes_budget"] == facts["bytes_all_4"] and "sensitivity" not in facts["memory"]
    idle = "has no effect: `quantize.bits` is [4], so nothing is measured or searched"
    assert (
        f"`search.max_trials` {idle}" in facts["warnings"] and f"`sensitivity.methods` {idle}" not in facts["warnings"]
    )
    _, facts = checked(uniform, *METHODS)
    assert f"`sensitivity.methods` {idle}" in facts["warnings"]


def test_check_tells_of_a_sensitivity_s_plan(uniform: Path) -> None:
    said, facts = checked(uniform, *BY_INFORMATION)
    assert "your plan:   the seed plan of mutual_information, inside the budget" in said
    assert "trials:      1, 1 at once" in said and facts["bytes_plan"] is None


@pytest.mark.slow
def test_one_bit_width_runs_whole_without_a_search(uniform: Path) -> None:
    """The paper's first variant, with the comparisons that are left: the report has no sensitivities to show."""
    done, run = qpruner("run", uniform), uniform.parent / "run"
    assert done.returncode == 0, done.stderr[-3000:]
    record = search_of(run)
    assert record["best_plan"] == {"layers.0": 4, "layers.1": 4}
    assert (record["num_trials"], record["best_origin"], record["ended"]) == (1, "given", ENDED)
    assert json.loads((run / "records" / "sensitivity.json").read_text())["methods"] == {}
    rows = [row["name"] for row in json.loads((run / "records" / "comparison.json").read_text())["candidates"]]
    assert rows == ["base", "pruned", "uniform 4-bit", "searched"], "there is no other plan to draw or to seed"
    assert "given plan (uniform-4)" in (run / "report.md").read_text()


@pytest.mark.slow
def test_the_seed_plan_of_a_sensitivity_is_taken(uniform: Path, tmp_path: Path) -> None:
    """The paper's second variant: bits by mutual information, and no search."""
    run = tmp_path / "run"
    done = qpruner("search", uniform, "--set", f"output={run}", *BY_INFORMATION)
    assert done.returncode == 0, done.stderr[-3000:]
    record = search_of(run)
    assert (record["num_trials"], record["best_origin"], record["ended"]) == (1, "given", ENDED)
    assert [each["origin"] for each in record["confirmations"]] == ["seed-mutual-information"]
    assert sorted(record["best_plan"].values()) == [4, 8], "half the bytes between all at 4 and all at 8"
