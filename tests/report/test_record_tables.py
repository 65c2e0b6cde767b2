"""Every record can be turned into a table with one row per item of its list."""

import inspect

import pytest
from made_run import MadeRun
from pydantic import BaseModel

import qpruner
from qpruner.report.snapshot import Snapshot
from qpruner.runs import records
from qpruner.runs.records import BankRecord, Recorded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Return a run with 60 groups, 20 trials and 13 fine-tunes."""
    return qpruner.read_run(MadeRun(tmp_path_factory.mktemp("tables") / "run", num_trials=20).run.root)


def test_every_record_has_a_table() -> None:
    kinds = [each for _, each in inspect.getmembers(records, inspect.isclass) if issubclass(each, BaseModel)]
    assert len(kinds) > 20
    assert [each.__name__ for each in kinds if each is not BaseModel and not issubclass(each, Recorded)] == []


@pytest.mark.parametrize(
    ("stage", "num_rows", "columns"),
    [
        ("prepare", 1, {"model_path", "num_rows.train", "seconds"}),
        ("prune", 60, {"cut", "layer", "kept_mlp_channels", "kept_parameters"}),
        ("sensitivity", 60, {"group", "kl in nf4", "kl in int8", "mutual_information in nf4"}),
        ("search", 4, {"index", "origin", "loss", "stderr", "control"}),
        ("finetune", 1, {"name", "seed", "validation_loss", "format of layers.00.mlp"}),
        ("evaluate", 4, {"name", "seed", "arc_easy acc", "arc_easy acc_stderr", "inference.memory_bytes"}),
        ("comparison", 13, {"name", "seed", "validation_loss", "format of layers.00.mlp", "arc_easy acc", "text_loss"}),
    ],
)
def test_a_stages_record_has_one_row_per_item(stage: str, num_rows: int, columns: set[str], run: Snapshot) -> None:
    frame = getattr(run.results, stage).to_dataframe()
    assert len(frame) == num_rows and columns <= set(frame.columns)
    assert not any(isinstance(cell, dict | list) for column in frame for cell in frame[column])


def test_a_bank_has_one_row_per_group_and_a_trial_one_row(run: Snapshot) -> None:
    by_group = {"nf4": {"a": 10, "b": 20}, "int8": {"a": 30, "b": 40}}
    fields = {"digest": "", "seconds": 1.0, "files": {}, "bytes": 1, "residual_ratio": {"nf4": {"a": 0.5, "b": 0.6}}}
    frame = BankRecord(**fields, group_bytes=by_group).to_dataframe()
    assert frame["group"].tolist() == ["a", "b"] and frame["group_bytes in int8"].tolist() == [30, 40]
    assert frame["residual_ratio in nf4"].tolist() == [0.5, 0.6]
    trial = run.trials[0]
    row = trial.to_dataframe().iloc[0]
    stages = "prepare, prune, bank, sensitivity, search, finetune, evaluate, comparison"
    assert repr(run) == f"<Snapshot of the run 'run': 20 trials; {stages}>"
    assert row.dropna().equals(run.to_dataframe().iloc[0][row.index].dropna())
    frame = run.to_dataframe()
    assert frame["loss at 16"].notna().sum() == (frame["status"] == "finished").sum()
    assert (row["plan_bytes"], row["loss at 16"]) == (trial.plan_bytes, trial.rungs[-1].loss)
    assert row["format of layers.00.mlp"] == trial.plan["layers.00.mlp"]
    assert len(trial.rungs[0].to_dataframe()) == 1


def test_records_inside_records_are_tables_and_show_themselves(run: Snapshot) -> None:
    results = run.results
    assert results.evaluate and results.sensitivity and results.prune
    questions = results.evaluate.rows[0].scores[0]
    frame = questions.to_dataframe()
    assert len(frame) == 400 and frame["correct"].mean() == questions.value
    assert results.to_dataframe()["stage"].tolist()[-3:] == ["finetune", "evaluate", "comparison"]
    method = results.sensitivity.methods["kl"]
    assert method.to_dataframe()["in nf4"].tolist() == list(method.values["nf4"])
    shown = results.prune._repr_html_()
    assert shown.count("<tr") == 1 + len(results.prune.to_dataframe()) and "<th>kept_parameters</th>" in shown
    markup = run.trials[0].model_copy(update={"origin": "<b>mine</b>"})._repr_html_()
    assert "&lt;b&gt;mine&lt;/b&gt;" in markup and "<b>" not in markup
