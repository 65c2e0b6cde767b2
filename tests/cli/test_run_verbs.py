"""`qpruner status`, `trials`, `plan` and `compare` as a person at another shell has them: from a run's files alone."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from click.testing import CliRunner, Result
from made_records import made_confirmation
from made_run import DIGEST, GROUPS, MadeRun, recorded_run, trial, trials

from qpruner.cli.main import main
from qpruner.errors import PlanRefused
from qpruner.plans.file import read_plan
from qpruner.report import results as table
from qpruner.report.html import render
from qpruner.report.sections import sections
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.lock import hold_run
from qpruner.runs.records import (
    BankRecord,
    ComparisonRecord,
    EvalRecord,
    PrepareRecord,
    Record,
    RowScores,
    RunState,
    SearchRecord,
    TrialPulse,
    TrialRecord,
)
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import REMEDIES, write_pulse, write_trial


def qpruner(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def told(*arguments: object) -> dict[str, Any]:
    """The JSON object of a verb."""
    result = qpruner(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run in its search, which this process drives."""
    root = recorded_run(tmp_path / "run")
    with hold_run(root, print):
        yield root


def test_status_shows_stages_trials_and_the_best(run: Path) -> None:
    text = qpruner("status", run).stdout
    assert "running on" in text and "last sign of life" in text
    assert "trials: 6 of 20: 3 finished, 1 stopped, 1 failed, 1 running on 2 slots; about 14 min 30 s left" in text
    assert "best so far:   validation loss 2.9000, trial 2 (gp), 32.0 MB [848444]" in text
    assert "best control:  validation loss 3.0000, trial 1 (seed-kl)" in text
    stages = {each["stage"]: each["state"] for each in told("status", run)["stages"]}
    assert list(stages)[:2] == ["prepare", "prune"]
    assert (stages["prepare"], stages["search"], stages["evaluate"]) == ("recorded", "running", "waiting")


def search_of(run: Path, **changes: Any) -> None:
    """Change what the search's record says."""
    record = RunDir(run).read_record("search", SearchRecord)
    assert record
    RunDir(run).write_record("search", record.model_copy(update=changes))


def test_status_names_the_winner(tmp_path: Path) -> None:
    run = recorded_run(tmp_path / "run", is_over=True)

    def lines() -> list[str]:
        text = qpruner("status", run).stdout
        return text[text.index("best so far:") :].splitlines()

    names = [line.partition(":")[0] for line in lines()]
    assert names == ["best so far", "best control", "begun", "failed", "  remedy", "winner"]
    assert lines()[-1] == "winner:        selection loss 2.9500, trial 2 (gp); `qpruner plan` prints its plan"
    control = made_confirmation(1, "seed-kl", 2.9)
    search_of(run, best_index=1, best_origin="seed-kl", control_won=True, confirmations=(control,))
    assert "trial 1 (seed-kl), a control that no searched plan beat; " in lines()[-1]


def test_status_shows_where_trials_are_and_why_they_failed(run: Path) -> None:
    """Trial 5 is past its only rung, and says so itself; trial 6 has a slot and no worker yet, trial 7 no slot."""
    folder = run / "trials" / DIGEST
    write_pulse(folder, 5, TrialPulse(node="a node", pid=1, step=3, beats=12, peak_memory_bytes=10**6))
    write_trial(folder, trial(6, "484844", [], status="running"))
    text = qpruner("status", run).stdout
    assert "1 failed, 2 running on 2 slots (1 of them waiting for a worker process to start); about" in text
    write_trial(folder, trial(7, "484448", [], status="running"))
    both = "1 of them waiting for a worker process to start, 1 of them waiting for a machine"
    assert f"3 running on 2 slots ({both}); about" in qpruner("status", run).stdout
    search = told("status", run)["search"]
    assert (search["starting"], search["waiting"]) == (1, 1)
    assert "under way:     trial 5 (gp), step 3/8" in text
    shown = {line.split()[0]: line for line in qpruner("trials", run).stdout.splitlines()}
    assert "  3.1000 @2" in shown["5"], "at step 3, with the loss of step 2"
    assert "@" not in shown["2"] and "@" not in shown["6"]
    assert "failed:        trial 4 (gp), diverged: TrainingDiverged: the loss is nan\n" in text
    assert "  remedy: lower `training.learning_rate`" in text
    rows = {row["trial"]: row for row in told("trials", run)["trials"]}
    assert [rows[index]["step"] for index in (2, 4, 5, 6)] == [8, 0, 3, 0]
    assert [rows[index]["rung"] for index in (2, 4, 5, 6)] == [8, None, 2, None]
    assert [row["trial"] for row in told("trials", run, "--where", "failure=diverged")["trials"]] == [4]
    assert "TrainingDiverged: the loss is nan" in qpruner("trials", run).stdout


@pytest.mark.parametrize("outcome", ["interrupted", "failed", "running"])
def test_trials_of_an_ended_command_are_begun(tmp_path: Path, outcome: str) -> None:
    """Ended by a person, by an error or, as `running` says without a driver, by a kill; the next command is not there
    before it has begun a stage."""
    run = recorded_run(tmp_path / "run", pid=2**22 + 1)
    folder = RunDir(run)
    state = folder.read_state(RunState)
    assert state
    folder.write_state(state.model_copy(update={"outcome": outcome}))
    write_trial(run / "trials" / DIGEST, trial(6, "484844", [], status="running"))

    def check() -> None:
        lines = qpruner("status", run).stdout.splitlines()
        trials = "trials: 7 of 20: 3 finished, 1 stopped, 1 failed, 2 begun; about 14 min 30 s left once it goes on"
        assert trials in lines
        assert "begun:         trial 5 (gp), step 2/8" in lines
        assert not any("under way" in line or "waiting for" in line for line in lines)
        search = told("status", run)["search"]
        assert (search["starting"], search["waiting"]) == (0, 0)
        snapshot = read_snapshot(RunDir(run))
        page = render(snapshot, sections(snapshot))
        assert "1 failed, 2 begun." in page

    check()
    with hold_run(run, print):
        check()


def test_every_way_to_fail_has_a_remedy() -> None:
    (kinds,) = [each for each in get_args(TrialRecord.model_fields["failure"].annotation) if get_args(each)]
    assert len(get_args(kinds)) == 8 and all(REMEDIES[kind] for kind in get_args(kinds))


def test_trials_are_filtered_and_sorted(run: Path) -> None:
    rows = told("trials", run, "--where", "loss<3.3", "--where", "status=finished", "--sort", "loss")["trials"]
    assert [row["trial"] for row in rows] == [2, 1, 0]
    rows = told("trials", run, "--sort", "loss", "--descending")["trials"]
    assert [row["trial"] for row in rows] == [3, 0, 5, 1, 2, 4], "what has no loss comes last"
    assert [row["trial"] for row in told("trials", run, "--where", "from!=gp")["trials"]] == [0, 1]
    assert [row["trial"] for row in told("trials", run, "--where", "origin!=gp")["trials"]] == [0, 1]
    assert told("trials", run, "--sort", "score") == told("trials", run, "--sort", "loss")
    for condition, expected in (("failure!=diverged", [0, 1, 2, 3, 5]), ("loss!=3.1", [0, 1, 2, 3, 4])):
        found = [row["trial"] for row in told("trials", run, "--where", condition)["trials"]]
        assert found == expected, "what has no such figure has not this one"


def test_bytes_are_asked_for_as_the_table_shows_them(run: Path) -> None:
    sizes = {row["trial"]: row["bytes"] for row in told("trials", run)["trials"]}
    middle = sorted(sizes.values())[len(sizes) // 2]
    for asked in (f"{middle / 1e6} MB", f"{middle / 1e6}MB", f"{middle / 2**10}KiB", f"{middle}"):
        found = [row["trial"] for row in told("trials", run, "--where", f"bytes<{asked}")["trials"]]
        assert found == [trial for trial, size in sizes.items() if size < middle] != []


def test_trials_mark_the_winner_once_it_is_chosen(run: Path, tmp_path: Path) -> None:
    assert "winner" not in qpruner("trials", run).stdout
    over = recorded_run(tmp_path / "over", is_over=True)
    heading, *lines = qpruner("trials", over).stdout.splitlines()
    assert heading.split()[:3] == ["trial", "winner", "from"]
    assert [line.split()[1] for line in lines[:6]] == ["-", "-", "yes", "-", "-", "-"]
    assert [row["trial"] for row in told("trials", over, "--where", "winner=yes")["trials"]] == [2]
    rows = csv.DictReader(io.StringIO(qpruner("trials", over, "--csv").stdout))
    assert [row["winner"] for row in rows] == ["", "", "yes", "", "", ""]


def test_trials_as_csv_has_the_bits_of_every_group(run: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(qpruner("trials", run, "--csv").stdout)))
    assert len(rows) == len(trials())
    assert [rows[1][f"bits {group}"] for group in GROUPS] == ["8", "8", "4", "4", "4", "4"]
    assert rows[4]["reason"] == "TrainingDiverged: the loss is nan"
    assert qpruner("trials", run, "--where", "loss<1").stdout == "no trials match\n"
    shutil.rmtree(run / "trials")
    assert qpruner("trials", run).stdout == "there are no trials yet\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("trials", "RUN", "--where", "statsu=failed"), "did you mean `status`?"),
        (("trials", "RUN", "--sort", "byte"), "did you mean `bytes`?"),
        (("trials", "RUN", "--sort", "xyz"), "index, origin, score, `bits layers.0` and so on, a group each"),
        (("trials", "RUN", "--where", "loss<low"), "`loss` is a number, got 'low'"),
        (("trials", "RUN", "--where", "bytes<126M"), "`bytes` is a number, plain or with kB, MB, GB"),
        (("trials", "RUN", "--where", "seconds<1 hour"), "`seconds` is a number, plain or with h, min, s, got"),
        (("trials", "RUN", "--where", "loss"), "--where takes KEY=VALUE"),
        (("trials", "RUN", "--srot", "loss"), "--sort"),
        (("plan", "RUN"), "not over"),
        (("plan", "RUN", "--trial", "17"), "no trial 17, only 6 trials"),
        (("status", "RUN/trials"), "no run.json"),
        (
            ("status", "RUN/run.json"),
            "RUN/run.json is a file, and a run is a folder: of a configuration give the folder",
        ),
        (("compare", "RUN", "RUN/run.json"), "the folder its `output` names"),
        (("statsu", "RUN"), "did you mean `qpruner status`?"),
    ],
)
def test_a_mistake_names_what_was_meant(run: Path, arguments: tuple[str, ...], hint: str) -> None:
    result = qpruner(*(argument.replace("RUN", str(run)) for argument in arguments))
    assert result.exit_code == 2
    assert hint.replace("RUN", str(run)) in result.stderr


def test_the_plan_that_is_printed_can_be_read_back(tmp_path: Path) -> None:
    run = recorded_run(tmp_path / "run", is_over=True)
    for options in ((), ("--json",)):
        file = tmp_path / "plan"
        file.write_text(qpruner("plan", run, *options).stdout)
        assert read_plan(file, GROUPS, (4, 8)).as_dict() == trials()[2].plan
    file.write_text(qpruner("plan", run, "--trial", 0).stdout)
    assert set(read_plan(file, GROUPS, (4, 8)).bits) == {4}


def test_a_plan_is_printed_with_bytes_and_budget(tmp_path: Path) -> None:
    run = recorded_run(tmp_path / "run", is_over=True)
    sizes = {str(bits): dict.fromkeys(GROUPS, bits * 250_000) for bits in (4, 8)}
    RunDir(run).write_record(
        "bank", BankRecord(digest="d", seconds=1.0, files={}, bytes=1, residual_ratio={}, group_bytes=sizes)
    )
    lines = qpruner("plan", run).stdout.splitlines()
    budget = told("plan", run)["budget_bytes"]
    assert lines[1] == "# 8.0 MB in these groups; 24.0 MB besides: embeddings, norms, head, adapter"
    assert lines[2] == f"# {(budget - 32e6) / 1e6:.2f} MB left of the budget of {budget / 1e6:.2f} MB"
    assert lines[3] == "layers.0: 8  # 1.00 MB at 4, 2.00 MB at 8"
    assert told("plan", run)["group_bytes"] == sizes


def test_a_given_plan_is_no_search_that_could_be_over(tmp_path: Path) -> None:
    run = recorded_run(tmp_path / "run", search__plan="mine.yaml")
    refused = qpruner("plan", run)
    assert refused.exit_code == 2
    assert "was given a plan (mine.yaml), which is not scored yet, and searches for none: `qpruner" in refused.stderr
    assert yaml.safe_load(qpruner("plan", run, "--trial", 0).stdout) == trials()[0].plan
    over = recorded_run(tmp_path / "over", is_over=True, search__plan="mine.yaml")
    assert yaml.safe_load(qpruner("plan", over).stdout) == trials()[2].plan
    write_trial(RunDir(over).trials / DIGEST, trial(1, "884444", [3.3, 3.2, 3.0], origin="given"))
    assert "given plan:    validation loss 3.0000, trial 1 (given)" in qpruner("status", over).stdout


def test_compare_shows_results_and_differing_settings(tmp_path: Path) -> None:
    first = recorded_run(tmp_path / "first", is_over=True)
    second = recorded_run(tmp_path / "second", search__searcher="random", lora__rank=2)
    facts = told("compare", first, second)
    assert [each["run"] for each in facts["runs"]] == [str(first), str(second)]
    assert facts["runs"][0]["selection_loss"] == pytest.approx(2.95)
    assert "selection_loss" not in facts["runs"][1], "its search is not over"
    assert facts["differing_settings"] == {"lora.rank": [4, 2], "search.searcher": ["gp", "random"]}
    text = qpruner("compare", first, second).stdout
    assert "848444" in text and "Settings that differ" in text
    same = "All settings are the same."
    assert same in qpruner("compare", first, first).stdout and same not in qpruner("compare", first).stdout


def test_compare_shows_hours_of_search_and_run(tmp_path: Path) -> None:
    """What an earlier configuration left in the folder is not counted."""
    made = MadeRun(tmp_path / "run", num_trials=12, num_blocks=2, until="finetune", gpus=2.0)
    record = made.run.read_record("search", SearchRecord)
    assert record
    made.run.write_record("search", record.model_copy(update={"gpu_seconds": 7200.0, "confirmation_gpu_seconds": 36.0}))
    made.run.write_record("evaluate", EvalRecord(digest="old", seconds=1e6, gpu_seconds=1e6, rows=(), tested="asked"))
    [facts] = told("compare", tmp_path / "run")["runs"]
    assert (facts["search_hours"], facts["search_gpu_hours"]) == (0.5, 2.01)
    assert facts["run_hours"] == pytest.approx(0.5 + 5 * 61.5 / 3600), "prepare to finetune"
    assert facts["run_gpu_hours"] == pytest.approx(2.01 + 5 * 2 * 61.5 / 3600)


def test_compare_tells_of_data_only_what_differs(tmp_path: Path) -> None:
    """What a configuration leaves open is a dash, and no list shows as Python has it."""
    source = "package:qpruner/demo/data/questions_train.jsonl"
    mine = {"source": source, "format": "multiple_choice", "limit": 8}
    theirs = {"source": source, "format": "multiple_choice", "columns": {"choices": ["one", "other"]}}
    first = recorded_run(tmp_path / "first", is_over=True, data__train=[mine])
    second = recorded_run(tmp_path / "second", is_over=True, data__train=[theirs, mine])
    assert told("compare", first, second)["differing_settings"] == {
        "data.train.0.limit": [8, None],
        "data.train.0.columns.choices": [None, ["one", "other"]],
        "data.train.1.source": [None, source],
        "data.train.1.format": [None, "multiple_choice"],
        "data.train.1.split": [None, "train"],
        "data.train.1.limit": [None, 8],
    }
    lines = [line.split(maxsplit=2) for line in qpruner("compare", first, second).stdout.splitlines()]
    assert ["data.train.0.limit", "8", "-"] in lines
    assert ["data.train.0.columns.choices", "-", "one, other"] in lines


def _changed(run: Path, stage: str, kind: type[Record], **changes: Any) -> None:
    record = RunDir(run).read_record(stage, kind)
    assert record
    RunDir(run).write_record(stage, record.model_copy(update=changes))


def _better_answers(run: Path) -> tuple[RowScores, ...]:
    """The scores of a run, but that its searched row answers every question, and at three quarters of the loss."""
    record = RunDir(run).read_record("comparison", ComparisonRecord)
    assert record
    return tuple(
        row.model_copy(
            update={
                "scores": tuple(
                    each.model_copy(
                        update={
                            "correct": (1.0,) * each.num_questions,
                            "answer_loss": tuple(0.75 * loss for loss in each.answer_loss),
                        }
                    )
                    for each in row.scores
                )
            }
        )
        if row.name == table.SEARCHED
        else row
        for row in record.rows
    )


def _asked(run: Path, digest: str) -> tuple[RowScores, ...]:
    """The evaluated rows, as if with questions of that digest."""
    record = RunDir(run).read_record("evaluate", EvalRecord)
    assert record
    return tuple(row.model_copy(update={"digest": digest}) for row in record.rows)


def test_compare_pairs_runs_of_the_same_questions(tmp_path: Path) -> None:
    """A difference of two means says nothing without its interval, which pairing narrows."""
    runs = [tmp_path / name for name in ("first", "second")]
    for run in runs:
        MadeRun(run, num_trials=12, num_blocks=2)
    _changed(runs[1], "comparison", ComparisonRecord, rows=_better_answers(runs[1]))
    facts = told("compare", *runs)
    [found] = facts["differences"]
    accuracy, answers, confirmation = found["differences"]
    assert (found["run"], found["other"], found["seeds"]) == (str(runs[1]), str(runs[0]), [0, 1, 2])
    assert (accuracy["measure"], accuracy["verdict"], accuracy["num_pairs"]) == ("acc", "better", 600)
    assert 0 < accuracy["mean"] - accuracy["half_width"] < accuracy["mean"] + accuracy["half_width"] < 1
    before = facts["runs"][0]["test_answer_loss"]
    assert facts["runs"][0]["test_metric"] == "acc"
    assert (answers["mean"], answers["verdict"]) == (pytest.approx(-before / 4, rel=0.05), "better")
    assert (confirmation["mean"], confirmation["verdict"]) == (0, "not distinguishable")
    text = qpruner("compare", *runs).stdout
    assert "second less first: +0.00% bytes, 3 training seeds, paired: acc +0." in text


def test_compare_pairs_only_what_was_measured_alike(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("first", "questions", "rows", "both", "unfinished")]
    for run in runs[:-1]:
        MadeRun(run, num_trials=12, num_blocks=2)
    MadeRun(runs[-1], num_trials=12, num_blocks=2, until="search")
    for run in (runs[1], runs[3]):
        _changed(run, "evaluate", EvalRecord, tested="other")
    for run in (runs[2], runs[3]):
        _changed(run, "prepare", PrepareRecord, digest="other")
    found = told("compare", *runs)["differences"]
    assert [[each["measure"] for each in one["differences"]] for one in found] == [
        ["confirmation loss"],
        ["acc", "answer loss"],
        [],
        [],
    ]
    assert [one["differ"] for one in found] == [["test questions"], ["confirmation rows"], [], []]
    text = qpruner("compare", *runs[:2]).stdout
    assert "; their test questions are others, so they are not compared." in text
    reasons = (None, None, "test questions and confirmation rows are others", "the final table of one of them is not")
    for one, reason in zip(found, reasons, strict=True):
        assert one["no_figures"] is reason is None or one["no_figures"].startswith(reason)
    assert "unfinished less first: nothing to pair, the final table of one" in qpruner("compare", *runs).stdout


def test_compare_pairs_test_questions_across_searches(tmp_path: Path) -> None:
    """A search by loss and one by accuracy: what the final models were asked has a digest of its own."""
    runs = [tmp_path / name for name in ("by-loss", "by-accuracy")]
    for run, digest in zip(runs, "01", strict=True):
        MadeRun(run, num_trials=12, num_blocks=2)
        _changed(run, "evaluate", EvalRecord, rows=_asked(run, digest), tested="same")
    [found] = told("compare", *runs)["differences"]
    assert [each["measure"] for each in found["differences"]] == ["acc", "answer loss", "confirmation loss"]


def test_compare_knows_one_model_in_two_folders(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("first", "copy")]
    for run in runs:
        MadeRun(run, num_trials=12, num_blocks=2)
        record = RunDir(run).read_record("comparison", ComparisonRecord)
        assert record
        tuned = tuple(each.model_copy(update={"adapter_sha256": f"sha of {each.seed}"}) for each in record.candidates)
        _changed(run, "comparison", ComparisonRecord, candidates=tuned)
    assert "copy less first: nothing to pair, it is the same fine-tuned model." in qpruner("compare", *runs).stdout


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    places = ("a/runs/demo", "b/runs/demo", "b/runs/mine", "demo")
    runs = [recorded_run(tmp_path / place, is_over=True) for place in places]
    heading = qpruner("compare", *runs).stdout.splitlines()[0]
    assert heading.split() == ["a/runs/demo", "b/runs/demo", "mine", f"{tmp_path.name}/demo"]
    assert qpruner("compare", runs[0], runs[0]).stdout.splitlines()[0].split() == ["demo", "demo"]


def test_looking_at_a_run_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    run = recorded_run(tmp_path / "run", is_over=True)
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom qpruner.cli.main import main\n"
        "for verb in ('status', 'trials', 'plan', 'compare'):\n"
        f"    assert CliRunner().invoke(main, [verb, {str(run)!r}]).exit_code == 0, verb\n"
        "heavy = {'torch', 'ray', 'transformers', 'peft', 'datasets', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ({**dict.fromkeys(GROUPS, 4), "layers.5": 6}, "`layers.5` must have one of 4, 8 bits (`quantize.bits`), got 6"),
        ({**dict.fromkeys(GROUPS, 4), "layer.5": 4}, "`layer.5` is no group of this model; did you mean `layers.5`?"),
        (dict.fromkeys(GROUPS[1:], 4), "1 of 6 groups are missing: layers.0"),
        (None, "must map every group to its bits, got an empty file; `qpruner plan RUN` prints one"),
        ([4, 4, 4, 4, 4, 4], "must map every group to its bits, got list; `qpruner plan RUN` prints one"),
    ],
)
def test_a_plan_that_is_none_for_the_model_is_refused(tmp_path: Path, plan: object, problem: str) -> None:
    from qpruner.errors import UserError

    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    with pytest.raises(UserError) as error:
        read_plan(file, GROUPS, (4, 8))
    assert problem in str(error.value)


def test_a_group_named_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    """YAML would take the last, and say nothing."""
    file = tmp_path / "plan.yaml"
    file.write_text("".join(f"{group}: 8\n" for group in GROUPS) + "layers.0: 4\n")
    with pytest.raises(PlanRefused, match=r"key `layers.0` is given twice\s.*line 7"):
        read_plan(file, GROUPS, (4, 8))


def test_bits_are_whole_numbers_however_they_are_written(tmp_path: Path) -> None:
    """As those of a configuration are: they name files of the bank."""
    file = tmp_path / "plan.yaml"
    file.write_text("".join(f"{group}: 8.0\n" for group in GROUPS))
    assert [repr(bits) for bits in read_plan(file, GROUPS, (4, 8)).bits] == ["8"] * len(GROUPS)


def test_a_damaged_record_says_what_to_do(run: Path) -> None:
    (run / "run.json").write_text("{")
    done = qpruner("status", run)
    assert done.exit_code == 1
    assert f"{run / 'run.json'} is not a RunState" in done.stderr
    assert "if a run wrote it, repeat `qpruner run`, which makes it anew" in done.stderr
