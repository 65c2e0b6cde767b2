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
    tasks = bench.compensated([bench.SAME_TEXT])
    assert len(set(tasks)) == len(tasks)
    assert len(tasks) > 10
    figures = {"achieved_rate": 0.2, "perplexity": 40.0, "ratio": 1.0, "seconds": 1.0}
    rows = [
        bench.Row(**asdict(task), **figures, commit="a commit", evaluated=bench.PUBLIC)
        for task in tasks
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    assert list(bench.known_rows(file, bench.PUBLIC).items()) == list(zip(tasks, rows, strict=True))
    assert bench.known_rows(file, bench.OWN) == {}


def test_the_published_rows_are_those_of_the_tables(pruning_benchmark: Any) -> None:
    bench = pruning_benchmark
    known = bench.known_rows(bench.ROWS, bench.PUBLIC)
    texts = bench.calibration_texts(bench.PUBLIC)
    for part, tasks_of in bench.PARTS.items():
        assert [task for task in tasks_of(texts) if task not in known] == [], part


def test_without_public_data_the_demo_text_is_divided(pruning_benchmark: Any) -> None:
    """No part of the short text is empty, and no evaluated text is used for calibration."""
    bench = pruning_benchmark.Bench.__new__(pruning_benchmark.Bench)  # without the model
    bench.evaluated = pruning_benchmark.OWN
    bench.pad_id = 0
    bench.tokenizer = load_tokenizer(resolve_source(pruning_benchmark.SOURCE, "model.source"))
    parts = {
        name: {tuple(row["input_ids"]) for row in rows} for name, rows in bench.windows.items()
    }
    assert parts.keys() == {"evaluated", "training", "same text"}
    sizes = {name: len(rows) for name, rows in parts.items()}
    assert min(sizes.values()) >= 10, sizes
    assert parts["evaluated"].isdisjoint(parts["training"] | parts["same text"])
    assert parts["training"].isdisjoint(parts["same text"])
    assert len(bench.samples("same text", 0).rows) >= 10
