"""What a stage leaves behind can be read again, or it is no record."""

from __future__ import annotations

import math
from pathlib import Path

from qpruner.data.losses import LossResult
from qpruner.runs.records import EvalRecord, KeptScore, MethodScores, MetricScore, RowScores, TaskScore
from qpruner.runs.storage import read_json, write_json


def test_the_score_of_one_question_can_be_read_again(tmp_path: Path) -> None:
    """Its standard error is no number; a record that nobody can read makes the evaluation run again each time."""
    metrics = {"acc": MetricScore(value=1.0, stderr=math.nan), "acc_norm": MetricScore(value=0.0, stderr=math.nan)}
    one = TaskScore(
        task="arc", metric="acc", value=1.0, stderr=math.nan, num_questions=1, correct=(1.0,), metrics=metrics
    )
    row = RowScores(digest="0" * 16, name="base", seed=0, scores=(one,))
    record = EvalRecord(digest="0" * 16, seconds=1.0, rows=(row,))
    write_json(tmp_path / "evaluate.json", record)
    again = read_json(tmp_path / "evaluate.json", EvalRecord)
    assert again is not None
    assert again.rows[0].scores[0].correct == (1.0,)
    assert math.isnan(again.rows[0].scores[0].stderr) and math.isnan(again.rows[0].scores[0].metrics["acc"].stderr)


def test_the_loss_of_one_row_can_be_read_again(tmp_path: Path) -> None:
    """Two confirmation rows are allowed, of which one chooses: its loss has no standard error, which is not zero."""
    loss = LossResult(mean=2.5, by_row=(2.5,))
    score = KeptScore(digest="0", gpu_seconds=0.0, loss=loss.mean, stderr=loss.stderr, losses=loss.by_row)
    write_json(tmp_path / "fresh.json", score)
    again = read_json(tmp_path / "fresh.json", KeptScore)
    assert again is not None and again.loss == 2.5 and math.isnan(again.stderr)


def test_a_sensitivity_of_one_sample_can_be_read_again(tmp_path: Path) -> None:
    scores = MethodScores(
        unit="nats", source="", values={4: (0.5,)}, seconds=1.0, details={"stderr": {"4": [math.nan]}}
    )
    write_json(tmp_path / "scores.json", scores)
    again = read_json(tmp_path / "scores.json", MethodScores)
    assert again is not None and math.isnan(again.details["stderr"]["4"][0])
