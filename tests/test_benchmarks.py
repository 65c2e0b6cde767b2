"""The benchmarks run, and what they promise about memory holds; long, so not in the fast tier."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def last_line(*arguments: str) -> dict[str, object]:
    """The JSON line that a benchmark ends with."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=7200, check=True
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_seven_billion_parameters_are_pruned_within_22_gib() -> None:
    """LLM-Pruner needs about 80 GB for this; 20 GiB of free memory are needed here."""
    found = last_line("benchmarks/prune_7b.py")
    assert found["below_22_gib"] is True
    before, after = found["parameters_before"], found["parameters_after"]
    assert isinstance(before, int) and isinstance(after, int)
    assert abs(1 - after / before - 0.2) < 0.001


@pytest.fixture(scope="module")
def pruning_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("pruning_benchmark", ROOT / "benchmarks" / "pruning.py")
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench  # dataclasses look their module up
    spec.loader.exec_module(bench)
    return bench


def test_measured_rows_are_taken_at_any_commit(tmp_path: Path, pruning_benchmark: Any) -> None:
    """A plain command goes on with those beside the script; nothing is measured here."""
    bench = pruning_benchmark
    tasks = bench.ends_kept(["same text"])
    assert {task.settings.first_layer for task in tasks} == {4} and len(set(tasks)) == 18
    rows = [
        bench.Row(*task.key, 0.2, 40.0, 1.0, 1.0, commit, bench.PUBLIC)
        for task, commit in zip(tasks, ["a", None] * 9, strict=True)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    assert bench.Measurements(None, file, 0.0, bench.PUBLIC).rows(tasks) == rows
    with pytest.raises(bench.OutOfTime, match="18 rows"):
        bench.Measurements(None, file, 0.0, bench.OWN).rows(tasks)
    assert bench.evaluated_text(tmp_path) == bench.OWN
    (tmp_path / "text").mkdir()
    assert bench.evaluated_text(tmp_path) == bench.PUBLIC
    assert bench.arguments_of([]).rows == ROOT / "benchmarks" / "pruning_rows.jsonl"


def test_without_public_data_the_demos_text_is_divided(pruning_benchmark: Any) -> None:
    """It is short: no part is empty, and nothing that is evaluated is calibrated on."""
    from qpruner.models.loading import load_tokenizer, resolve_source

    bench = pruning_benchmark.Bench.__new__(pruning_benchmark.Bench)  # without the model
    bench.evaluated, bench.pad_id = pruning_benchmark.OWN, 0
    bench.tokenizer = load_tokenizer(resolve_source(pruning_benchmark.SOURCE, "model.source"))
    assert bench.texts == ["same text"]
    parts = {name: {tuple(row["input_ids"]) for row in rows} for name, rows in bench.windows.items()}
    assert all(len(rows) >= 10 for rows in parts.values()), {name: len(rows) for name, rows in parts.items()}
    assert parts["evaluated"].isdisjoint(parts["training"] | parts["same text"])
    assert parts["training"].isdisjoint(parts["same text"])
    for seed in (0, 1):
        assert len(bench.samples("same text", seed).rows) >= 10
