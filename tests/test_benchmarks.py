"""Benchmark of pruning: which rows it measures, and the demo text it uses without public data."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from test_gpu_benchmark import script

from qpruner.models.loading import load_tokenizer, resolve_source


@pytest.fixture(scope="module")
def pruning_benchmark() -> Any:
    return script("pruning")


def test_rows_of_any_commit_are_reused(tmp_path: Path, pruning_benchmark: Any) -> None:
    """Recorded rows need not be measured again, unless they are of other data."""
    bench = pruning_benchmark
    tasks = bench.ends_kept(["same text"])
    assert {task.settings.first_layer for task in tasks} == {4}
    assert len(set(tasks)) == 16
    rows = [bench.Row(*task.key, 0.2, 40.0, 1.0, 1.0, "a commit", bench.PUBLIC) for task in tasks]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    assert bench.Measurements(None, file, 0.0, bench.PUBLIC).rows(tasks) == rows
    with pytest.raises(bench.OutOfTime, match="16 rows"):
        bench.Measurements(None, file, 0.0, bench.OWN).rows(tasks)


def test_without_public_data_the_demo_text_is_divided(pruning_benchmark: Any) -> None:
    """No part of the short text is empty, and no evaluated text is used for calibration."""
    bench = pruning_benchmark.Bench.__new__(pruning_benchmark.Bench)  # without the model
    bench.evaluated = pruning_benchmark.OWN
    bench.pad_id = 0
    bench.tokenizer = load_tokenizer(resolve_source(pruning_benchmark.SOURCE, "model.source"))
    assert bench.texts == ["same text"]
    parts = {
        name: {tuple(row["input_ids"]) for row in rows} for name, rows in bench.windows.items()
    }
    assert all(len(rows) >= 10 for rows in parts.values()), {
        name: len(rows) for name, rows in parts.items()
    }
    assert parts["evaluated"].isdisjoint(parts["training"] | parts["same text"])
    assert parts["training"].isdisjoint(parts["same text"])
    assert len(bench.samples("same text", 0).rows) >= 10
