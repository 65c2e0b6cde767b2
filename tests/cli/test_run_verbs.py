"""`qpruner status`, `trials`, `plan` and `compare`, which read only the files of a run."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from conftest import Raw, assert_has, command, run_program
from made_records import made_finalist
from made_run import GROUPS, TRIALS, MadeRun, recorded_run, trial, trials
from plain_transformers import run_python

from qpruner.errors import PlanRefused
from qpruner.plans.plan import read_plan
from qpruner.report.html import render
from qpruner.report.sections import sections
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.lock import hold_run
from qpruner.runs.records import (
    SEARCHED,
    EvalRecord,
    RunState,
    SearchRecord,
    TrialPulse,
    TrialRecord,
)
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import REMEDIES, write_pulse, write_trial


def printed(*arguments: object) -> str:
    return command(*arguments).stdout


def json_of(*arguments: object) -> Raw:
    """Return the JSON object that a verb prints."""
    result = command(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


def listed(run: Path, *options: str) -> list[int]:
    """Return the numbers of the trials that `qpruner trials` lists."""
    return [row["trial"] for row in json_of("trials", run, *options)["trials"]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run in its search, locked by this process as its driver."""
    root = recorded_run(tmp_path / "run")
    with hold_run(root, print):
        yield root


@pytest.fixture
def over(tmp_path: Path) -> Path:
    return recorded_run(tmp_path / "over", is_over=True)


def test_status_shows_stages_trials_and_the_best(run: Path) -> None:
    text = printed("status", run)
    counts = ("6 of 20", "3 finished", "1 stopped", "1 failed", "1 of 2 slots", "14 min 30 s left")
    best = ("2.9000, trial 2 (gp)", "32.0 MB [848444]", "3.0000, trial 1 (unpruned-knapsack)")
    for part in ("running on", "last sign of life", *counts, *best):
        assert part in text
    stages = {each["stage"]: each["state"] for each in json_of("status", run)["stages"]}
    assert list(stages)[:2] == ["prepare", "prune"]
    assert_has(stages, prepare="recorded", search="running", evaluate="waiting")


def test_status_names_the_winner(over: Path) -> None:
    def lines() -> list[str]:
        text = printed("status", over)
        return text[text.index("best so far") :].splitlines()

    names = [line[:12].strip() for line in lines()]
    assert names == ["best so far", "best control", "begun", "failed", "remedy: lo", "winner"]
    assert "2.9500, trial 2 (gp); `qpruner plan`" in lines()[-1]
    record = RunDir(over).read_record("search", SearchRecord)
    assert record
    changes = {"best_index": 1, "finalists": (made_finalist(1, "unpruned-knapsack", 2.9),)}
    RunDir(over).write_record("search", record.model_copy(update=changes))
    assert "trial 1 (unpruned-knapsack), a control" in lines()[-1]


def test_status_tells_which_cut_was_left_out(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=4, num_blocks=2, until="search")
    made.change("prune", left_out={"cut-30": "24 channels are no multiple of 32"})
    [left_out] = [line for line in printed("status", made.run.root).splitlines() if "left" in line]
    assert left_out.endswith("30 % pruned: 24 channels are no multiple of 32")
    lines = [line.split()[3:5] for line in printed("trials", tmp_path / "run").splitlines()]
    assert lines[0] == ["cut", "status"]
    assert lines[1] == ["20", "%"]


def test_status_shows_waiting_and_failed_trials(run: Path) -> None:
    """Trial 5 reports a step beyond its last rung; trial 6 has a slot but no worker yet; trial 7
    has no slot."""
    folder = run / "trials" / TRIALS
    write_pulse(
        folder, 5, TrialPulse(node="a node", pid=1, step=3, beats=12, peak_memory_bytes=10**6)
    )
    write_trial(folder, trial(6, "484844", [], status="running"))
    write_trial(folder, trial(7, "484448", [], status="running"))
    text = printed("status", run)
    search = json_of("status", run)["search"]
    assert "2 of 2 slots busy, 1 waiting" in text
    assert [each["trial"] for each in search["under_way"]] == [5, 6, 7]
    assert "trial 5 (gp), not pruned, step 3/8" in text
    assert "trial 4 (gp), diverged: TrainingDiverged" in text
    assert "remedy: lower `training.learning_rate`" in text
    text = printed("trials", run)
    shown = {line.split()[0]: line for line in text.splitlines()}
    # At step 3, with the loss of step 2.
    assert "  3.1000 @2" in shown["5"]
    assert "@" not in shown["2"]
    assert "@" not in shown["6"]
    rows = {row["trial"]: row for row in json_of("trials", run)["trials"]}
    places = [(rows[index]["step"], rows[index]["rung"]) for index in (2, 4, 5, 6)]
    assert places == [(8, 8), (0, None), (3, 2), (0, None)]


@pytest.mark.parametrize("outcome", ["interrupted", "failed", "running"])
def test_running_trials_of_an_ended_command_are_begun(tmp_path: Path, outcome: str) -> None:
    """A command ended by Ctrl-C, by an error or, as `running` without a driver shows, by a kill."""
    run = recorded_run(tmp_path / "run", pid=2**22 + 1)
    state = RunDir(run).read_state(RunState)
    RunDir(run).write_state(state.model_copy(update={"outcome": outcome}))
    write_trial(run / "trials" / TRIALS, trial(6, "484844", [], status="running"))

    snapshot = read_snapshot(RunDir(run))
    status = printed("status", run)
    assert "7 of 20 trials" in status
    assert "trial 5 (gp), not pruned, step 2/8" in status
    for text in (status, render(snapshot, sections(snapshot))):
        assert "1 failed; 2 begun; about 14 min 30 s left once" in text
    assert "under way" not in status
    assert "waiting for" not in status


def test_every_kind_of_failure_has_a_remedy() -> None:
    [kinds] = [
        each for each in get_args(TrialRecord.model_fields["failure"].annotation) if get_args(each)
    ]
    assert len(get_args(kinds)) == 8
    assert all(REMEDIES[kind] for kind in get_args(kinds))


def test_trials_are_sorted(run: Path) -> None:
    assert listed(run) == listed(run, "--sort", "bytes") == [0, 1, 2, 3, 4, 5]
    # A trial without a loss comes last.
    assert listed(run, "--sort", "loss") == [2, 1, 5, 0, 3, 4]
    other = trial(6, "484844", [], status="running")
    write_trial(run / "trials" / TRIALS, other.model_copy(update={"plan": {"layers.77": "nf4"}}))
    # Cuts may have other blocks.
    assert 6 in listed(run, "--sort", "format layers.77")


def test_trials_mark_the_winner_once_it_is_chosen(run: Path, over: Path) -> None:
    assert "winner" not in printed("trials", run)
    heading, *lines = printed("trials", over).splitlines()
    assert heading.split()[:3] == ["trial", "winner", "from"]
    assert [line.split()[1] for line in lines[:6]] == ["-", "-", "yes", "-", "-", "-"]
    rows = json_of("trials", over)["trials"]
    assert [row["winner"] for row in rows] == [None, None, "yes", None, None, None]
    assert [rows[1][f"format {group}"] for group in GROUPS] == [*["int8"] * 2, *["nf4"] * 4]
    assert rows[4]["reason"].startswith("TrainingDiverged: ")
    shutil.rmtree(run / "trials")
    assert "no trials yet" in printed("trials", run)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("trials RUN --sort byte", "did you mean `bytes`?"),
        ("trials RUN --sort xyz", "there are trial, winner, from"),
        ("plan RUN", "not over"),
        ("plan RUN --trial 17", "no trial 17, only 6 trials"),
        ("status RUN/trials", "no run.json"),
        ("status RUN/run.json", "RUN/run.json is a file, but a run is a folder; name the folder"),
        ("compare RUN RUN/run.json", "name the folder of the run"),
    ],
)
def test_a_mistake_gets_a_hint(run: Path, words: str, hint: str) -> None:
    result = command(*(word.replace("RUN", str(run)) for word in words.split()))
    assert result.exit_code == 2
    assert hint.replace("RUN", str(run)) in result.stderr


def test_a_damaged_record_has_a_remedy(run: Path) -> None:
    (run / "run.json").write_text("{")
    done = command("status", run)
    assert done.exit_code == 1
    assert f"{run / 'run.json'} is not a RunState" in done.stderr
    assert "remedy: repeat `qpruner run`" in done.stderr


# ---- plan

OFFERED = dict.fromkeys(GROUPS, ("nf4", "int8"))


def test_a_printed_plan_can_be_read_back(over: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan"
    for options in ((), ("--json",)):
        file.write_text(printed("plan", over, *options))
        assert read_plan(file, {"base": OFFERED}, "base").as_dict() == trials()[2].plan


def test_a_plan_is_printed_with_bytes_and_budget(over: Path) -> None:
    lines = printed("plan", over).splitlines()
    facts = json_of("plan", over)
    budget = facts["budget_bytes"]
    assert lines[1:4] == [
        f"# {(budget - 32e6) / 1e6:.2f} MB left of the budget of {budget / 1e6:.2f} MB",
        "cut: base  # not pruned",
        "layers.0: int8",
    ]


def test_plan_of_a_run_with_a_given_plan(tmp_path: Path) -> None:
    run = recorded_run(tmp_path / "run", search__plan="mine.yaml")
    refused = command("plan", run)
    assert refused.exit_code == 2
    assert "no winner yet: `qpruner" in refused.stderr
    assert yaml.safe_load(printed("plan", run, "--trial", 0)) == {"cut": "base", **trials()[0].plan}
    over = recorded_run(tmp_path / "over", is_over=True, search__plan="mine.yaml")
    assert yaml.safe_load(printed("plan", over)) == {"cut": "base", **trials()[2].plan}
    write_trial(RunDir(over).trials / TRIALS, trial(1, "884444", [3.3, 3.2, 3.0], origin="given"))
    assert "3.0000, trial 1 (given)" in printed("status", over)


ALL_4 = dict.fromkeys(GROUPS, "nf4")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            yaml.safe_dump(ALL_4 | {"layers.5": 6}),
            r"`layers.5` must be one of nf4, int8 \(`quantize.formats`\), got 6",
        ),
        (
            yaml.safe_dump(ALL_4 | {"layer.5": "nf4"}),
            "`layer.5` is not a group of this model; did you mean `layers.5`?",
        ),
        (yaml.safe_dump(dict.fromkeys(GROUPS[1:], "nf4")), "1 of 6 groups are missing: layers.0"),
        (
            "",
            "must map every group to its format, got an empty file; `qpruner plan RUN` prints a "
            "plan",
        ),
        (
            "[4, 4, 4, 4, 4, 4]",
            "must map every group to its format, got list; `qpruner plan RUN` prints a plan",
        ),
        (yaml.safe_dump(ALL_4) + "layers.0: nf4", r"key `layers.0` is given twice\s.*line 7"),
    ],
)
def test_an_invalid_plan_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(PlanRefused, match=problem):
        read_plan(file, {"base": OFFERED}, "base")


# ---- compare


def test_compare_shows_results_and_differing_settings(tmp_path: Path) -> None:
    """A key that only one run sets shows a dash for the other; lists are shown without Python's
    brackets."""
    source = {
        "source": "package:qpruner/demo/data/questions_train.jsonl",
        "format": "multiple_choice",
    }
    theirs = source | {"columns": {"choices": ["one", "other"]}}
    first = recorded_run(tmp_path / "first", is_over=True, data__train=[source | {"limit": 8}])
    second = recorded_run(
        tmp_path / "second", search__searcher="random", lora__rank=2, data__train=[theirs, source]
    )
    facts = json_of("compare", first, second)
    assert [each["run"] for each in facts["runs"]] == [str(first), str(second)]
    assert facts["runs"][0]["selection_loss"] == pytest.approx(2.95)
    # Its search is not over.
    assert "selection_loss" not in facts["runs"][1]
    assert facts["differing_settings"] == {
        "data.train.0.limit": [8, None],
        "data.train.0.columns.choices": [None, ["one", "other"]],
        "data.train.1.source": [None, source["source"]],
        "data.train.1.format": [None, "multiple_choice"],
        "data.train.1.split": [None, "train"],
        "lora.rank": [4, 2],
        "search.searcher": ["gp", "random"],
    }
    text = printed("compare", first, second)
    assert "4 nf4, 2 int8" in text
    assert "Settings that differ" in text
    lines = [line.split(maxsplit=2) for line in text.splitlines()]
    assert ["data.train.0.limit", "8", "-"] in lines
    assert ["data.train.0.columns.choices", "-", "one, other"] in lines
    same = "All settings are the same."
    assert same in printed("compare", first, first)
    assert same not in printed("compare", first)


def test_compare_shows_hours_of_search_and_run(tmp_path: Path) -> None:
    """Records of an earlier configuration in the same folder are not counted."""
    made = MadeRun(tmp_path / "run", num_trials=12, num_blocks=2, until="finetune", gpus=2.0)
    made.change("search", gpu_seconds=7200.0)
    made.hold_for_finalists(36.0)
    made.run.write_record(
        "evaluate", EvalRecord(digest="old", seconds=1e6, gpu_seconds=1e6, rows=(), tested="asked")
    )
    [facts] = json_of("compare", tmp_path / "run")["runs"]
    assert_has(facts, search_hours=0.5, search_gpu_hours=2.01)
    # These are the stages from prepare to finetune.
    assert_has(
        facts,
        run_hours=pytest.approx(0.5 + 5 * 61.5 / 3600),
        run_gpu_hours=pytest.approx(2.01 + 5 * 2 * 61.5 / 3600),
    )


def test_compare_pairs_runs_of_the_same_questions(tmp_path: Path) -> None:
    """Every difference has a confidence interval, which pairing by question narrows."""
    runs = [tmp_path / name for name in ("first", "second")]
    _, better = (MadeRun(run, num_trials=12, num_blocks=2) for run in runs)

    rows = list(better.record("comparison").rows)
    for place, row in enumerate(rows):
        if row.name == SEARCHED:
            scores = [
                each.model_copy(
                    update={
                        "correct": (1.0,) * each.num_questions,
                        "answer_loss": (0.5,) * each.num_questions,
                    }
                )
                for each in row.tasks
            ]
            rows[place] = row.model_copy(update={"tasks": tuple(scores)})
    better.change("comparison", rows=tuple(rows))
    facts = json_of("compare", *runs)
    [found] = facts["differences"]
    accuracy, answers, confirmation = found["differences"]
    assert_has(found, run=str(runs[1]), other=str(runs[0]), seeds=[0, 1, 2])
    assert_has(accuracy, measure="acc", verdict=None, num_pairs=600)
    assert (
        0
        < accuracy["mean"] - accuracy["half_width"]
        < accuracy["mean"] + accuracy["half_width"]
        < 1
    )
    before = facts["runs"][0]["test_answer_loss"]
    assert facts["runs"][0]["test_metric"] == "acc"
    assert answers["mean"] == pytest.approx(0.5 - before, rel=0.01)
    assert answers["mean"] < -answers["half_width"]
    assert_has(confirmation, mean=0, verdict="not distinguishable")
    text = printed("compare", *runs)
    assert re.search(r"second minus first: \+0\.00% bytes, 3 .*: acc \+0\.", text)


def test_compare_pairs_only_equal_measurements(tmp_path: Path) -> None:
    """`searched` has the test questions of the first run, but other questions in its search."""
    on_rows = ["confirmation loss"]
    on_questions = ["acc", "answer loss"]
    expected: dict[str, tuple[list[str], str]] = {
        "questions": (on_rows, "not distinguishable."),
        "rows": (on_questions, ""),
        "both": (
            [],
            "nothing to compare, the runs share no training seed, or neither test questions nor "
            "confirmation rows.",
        ),
        "searched": ([*on_questions, *on_rows], ""),
        "unfinished": ([], "nothing to compare, one of the runs has no final table yet."),
    }
    made = {
        name: MadeRun(tmp_path / name, 12, 2)
        for name in ("first", *expected)
        if name != "unfinished"
    }
    MadeRun(tmp_path / "unfinished", 12, 2, until="search")
    for name in ("questions", "both"):
        made[name].change("evaluate", tested="other")
    for name in ("rows", "both"):
        made[name].change("prepare", digest="other")
    rows = [
        row.model_copy(update={"digest": "1"}) for row in made["searched"].record("evaluate").rows
    ]
    made["searched"].change("evaluate", rows=tuple(rows))
    runs = [tmp_path / name for name in ("first", *expected)]
    found = json_of("compare", *runs)["differences"]
    lines = [line for line in printed("compare", *runs).splitlines() if " minus " in line]
    for line, one, (measures, end) in zip(lines, found, expected.values(), strict=True):
        assert [each["measure"] for each in one["differences"]] == measures
        assert line.endswith(end)


def test_runs_with_the_same_name_show_their_folders(tmp_path: Path) -> None:
    runs = [
        recorded_run(tmp_path / place, is_over=True) for place in ("a/demo", "b/demo", "b/mine")
    ]
    assert printed("compare", *runs).splitlines()[0].split() == list(map(str, runs))
    assert printed("compare", *runs[1:]).splitlines()[0].split() == ["demo", "mine"]
    assert printed("compare", runs[0], runs[0]).splitlines()[0].split() == ["demo", "demo"]


def test_help_and_status_import_no_heavy_library(over: Path) -> None:
    asked = [["--help"], ["--version"], ["run", "--help"]]
    asked += [[verb, str(over)] for verb in ("status", "trials", "plan", "compare")]
    code = (
        "import sys, qpruner\nassert 'qpruner.pipeline' not in sys.modules\n"
        "from click.testing import CliRunner\nfrom qpruner.cli.main import main\n"
        "assert qpruner.run and qpruner.read_run\n"
        f"for words in {asked}:\n    assert CliRunner().invoke(main, words).exit_code == 0, words\n"
        "heavy = {'torch', 'ray', 'transformers', 'peft', 'datasets', 'scipy', 'matplotlib'} & "
        "set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run_python(code)


def test_a_terminal_of_ascii_gets_plain_signs(tmp_path: Path) -> None:
    """Python would end with a UnicodeEncodeError at the sign of the first interval."""
    for name in ("a", "b"):
        MadeRun(tmp_path / name, num_trials=12, num_blocks=2)
    command = (sys.executable, "-m", "qpruner", "compare", tmp_path / "a", tmp_path / "b")
    said = run_program(*command, environment=os.environ | {"PYTHONIOENCODING": "ascii"}).stdout
    assert "(+- " in said
    assert said.isascii()
