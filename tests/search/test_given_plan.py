"""`qpruner run CONFIG --plan FILE` as a user types it: a plan changed by hand becomes the model,
without a search."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import Raw, assert_has, command, winner_in
from real_driver import config_file, search_record
from whole_runs import said

ENDED = "only one plan was to be tried (`search.plan`, or a single one is possible)"
CONTROLS = ["unpruned-uniform", "cut-20-uniform", "cut-20-knapsack"]
UNIFORM, SEED = 1, 2
"""The numbers of the trials of that search, after the unpruned control, which exceeds the budget.
"""


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run whose search of a seed plan and the uniform one is over."""
    keys = {
        "sensitivity.methods": ["first_order"],
        "search.max_trials": 3,
        "finetune.compare": False,
    }
    config = config_file(tiny_model, tmp_path_factory.mktemp("given"), **keys)
    said(config, verb="search")
    return config


def comparison_rows(run: Path) -> list[Raw]:
    return list(json.loads((run / "records" / "comparison.json").read_text())["rows"])


def origins_of(search: Raw) -> list[str]:
    """List where the plans of a search's finalists come from."""
    return [finalist["fine_tunes"][0]["origin"] for finalist in search["finalists"]]


def plan_file(config: Path, **changes: str) -> tuple[Path, dict[str, str]]:
    """The uniform trial's plan, changed by hand."""
    plan = (
        yaml.safe_load(said(config.parent / "run", "--trial", str(UNIFORM), verb="plan")) | changes
    )
    file = config.parent / f"plan-{len(list(config.parent.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump(plan))
    assert plan.pop("cut") == "cut-20"
    return file, plan


@pytest.mark.slow
def test_a_given_plan_wins_and_joins_the_next_search(searched: Path) -> None:
    """The given plan wins whatever its score; the next search scores it beside its own plans."""
    run = searched.parent / "run"
    before = search_record(run)
    file, changed = plan_file(searched, **{"layers.0.qkv": "int8", "layers.1.o": "int8"})
    compared = ("--set", "finetune.compare=true", "--set", "finetune.seeds=1")
    told = said(searched, "--plan", str(file), *compared, "--json")
    assert json.loads(told.splitlines()[-1])["best_plan"] == changed
    record = search_record(run)
    assert_has(record, num_trials=1, ended=ENDED)
    assert winner_in(record)["origin"] == "given"
    listed = json.loads(said(run, "--json", verb="trials"))["trials"]
    assert [(row["from"], row["search"]) for row in listed] == [
        *((origin, "another") for origin in CONTROLS), ("given", "this"),
    ]  # fmt: skip
    assert origins_of(record) == ["given"]
    assert record["rival"] is None
    tuned = {row["name"]: row for row in comparison_rows(run)}
    assert_has(tuned["searched"], plan=changed, origin=f"given, trial {record['best_index']}")

    said(searched, "--set", "search.confirm=9", verb="search")
    again = search_record(run)
    assert origins_of(again) == [*origins_of(before), "given of another search"]


@pytest.mark.slow
def test_a_plan_that_a_search_has_tried_is_not_tried_again(searched: Path) -> None:
    run = searched.parent / "run"
    before = {path: path.read_bytes() for path in run.glob(f"trials/*/{SEED:04}/trial.json")}
    file = searched.parent / "tried.json"
    file.write_text(said(run, "--trial", str(SEED), "--json", verb="plan"))
    said(searched, "--plan", str(file), verb="search")
    record = search_record(run)
    assert_has(record, num_trials=0, best_index=SEED)
    assert winner_in(record)["origin"] == "given"
    assert {path: path.read_bytes() for path in before} == before


# ---- a plan that the configuration gives without a file


@pytest.fixture(scope="module")
def uniform(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with one format."""
    keys = {
        "quantize": {"group": "block", "bits": [4]},
        "finetune.seeds": 1,
        "finetune.random_plans": 1,
    }
    return config_file(tiny_model, tmp_path_factory.mktemp("uniform"), **keys)


METHODS = ("--set", "sensitivity.methods=[mutual_information]")
BY_INFORMATION = ("--set", "quantize.bits=[4, 8]", *METHODS, "--plan", "mutual_information")


def checked(*arguments: object) -> tuple[str, Raw]:
    done = command("check", *arguments, "--json", "--gpu")
    assert done.exit_code == 0, done.output
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_check_names_a_plan_without_a_file(uniform: Path) -> None:
    said, facts = checked(uniform)
    assert "trials:      1, 1 at once" in said
    assert "none of `data.train` for the sensitivities" in said
    assert facts["bytes_budget"] == facts["bytes_all_nf4"]
    assert "sensitivity" not in facts["memory"]
    idle = "has no effect: nf4 is the only format (`quantize`), so nothing is"
    trials = f"`search.max_trials` {idle} searched"
    methods = f"`sensitivity.methods` {idle} measured"
    assert trials in facts["warnings"]
    assert methods not in facts["warnings"]
    assert methods in checked(uniform, *METHODS)[1]["warnings"]
    said, facts = checked(uniform, *BY_INFORMATION)
    assert "trials:      1, 1 at once" in said
    assert facts["bytes_plan"] is None


def test_check_names_no_plan_if_the_cut_is_searched(uniform: Path) -> None:
    size = checked(uniform)[1]["bytes_all_nf4"]
    cuts = ("prune.rate=null", "prune.rates=[0, 0.2]", f"quantize.budget={{bytes: {size}}}")
    assert (
        "your plan"
        not in checked(uniform, *(option for key in cuts for option in ("--set", key)))[0]
    )


@pytest.mark.slow
def test_one_format_runs_whole_without_a_search(uniform: Path) -> None:
    """The first variant of the paper: the report has no sensitivities, and fewer comparisons."""
    run = uniform.parent / "run"
    said(uniform)
    record = search_record(run)
    assert_has(record, num_trials=1, ended=ENDED)
    plan = {"embeddings": "bf16", "layers.0": "nf4", "layers.1": "nf4"}
    assert_has(winner_in(record), plan=plan, origin="given")
    assert json.loads((run / "records" / "sensitivity.json").read_text())["methods"] == {}
    rows = [row["name"] for row in comparison_rows(run)]
    # There is no other plan to draw.
    # The unpruned plan exceeds the budget, and controls that cannot win come last.
    assert rows == ["base", "pruned", "cut-20-uniform", "unpruned-uniform", "searched"]
    assert "given plan" in (run / "report.md").read_text()


@pytest.mark.slow
def test_one_format_of_all_groups_is_searched_over_cuts(uniform: Path, tmp_path: Path) -> None:
    """All plans are controls: the searcher has nothing to choose."""
    run = tmp_path / "run"
    one = "quantize={formats: [q4_0], embeddings: [q4_0], budget: {bytes: 1000000}}"
    cuts = ("prune.rate=null", "prune.rates=[0, 0.2]", "search.searcher=gp", f"output={run}", one)
    said(uniform, *(option for key in cuts for option in ("--set", key)), verb="search")
    record = search_record(run)
    assert_has(record, num_trials=2, ended="every plan inside the budget was tried")


@pytest.mark.slow
def test_the_seed_plan_of_a_sensitivity_is_taken(uniform: Path, tmp_path: Path) -> None:
    """The paper's second variant: formats by mutual information, and no search."""
    run = tmp_path / "run"
    said(uniform, "--set", f"output={run}", *BY_INFORMATION, verb="search")
    record = search_record(run)
    assert_has(record, num_trials=1, ended=ENDED)
    assert winner_in(record)["origin"] == "given"
    assert origins_of(record) == ["given"]
    # The budget is half way between all groups at 4 bits and all at 8.
    assert sorted(winner_in(record)["plan"].values()) == ["bf16", "int8", "nf4"]
