"""What a stage leaves behind can be read again, or it is no record."""

from __future__ import annotations

import math
from pathlib import Path

from qpruner.records import EvalRecord, RowScores, TaskScore
from qpruner.rundir import read_json, write_json


def test_the_score_of_one_question_can_be_read_again(tmp_path: Path) -> None:
    """Its standard error is no number; a record that nobody can read makes the evaluation run again each time."""
    one = TaskScore(task="arc", metric="acc", value=1.0, stderr=math.nan, num_questions=1, correct=(1.0,))
    row = RowScores(digest="0" * 16, name="base", seed=0, scores=(one,))
    record = EvalRecord(digest="0" * 16, seconds=1.0, rows=(row,))
    write_json(tmp_path / "evaluate.json", record)
    again = read_json(tmp_path / "evaluate.json", EvalRecord)
    assert again is not None
    assert again.rows[0].scores[0].correct == (1.0,)
    assert math.isnan(again.rows[0].scores[0].stderr)
