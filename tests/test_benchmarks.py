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


def test_rows_of_the_pruning_benchmark_are_taken_at_whatever_commit_they_were_measured(
    tmp_path: Path, pruning_benchmark: Any
) -> None:
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


def test_the_tables_of_the_pruning_benchmark_have_every_text_and_the_spread_over_seeds(pruning_benchmark: Any) -> None:
    bench, texts = pruning_benchmark, ["same text", "web text"]

    def rows(tasks: Any, *ratios: float) -> list[Any]:
        return [bench.Row(*task.key, 0.2, 40.0, ratio, 1.0) for task, ratio in zip(tasks, ratios, strict=True)]

    default = ("fisher", "global", "least_squares")
    of_one = [task for task in bench.compensated(texts, [default[:2]], bench.RATES, []) if task.key[1:4] == default]
    found = rows(of_one[:4], 1.5, 1.7, 2.4, 2.6)
    found += rows(bench.repeated(["same text"], [default]), 1.6, 1.4)
    found += rows(bench.finetuned(["same text"], [default], []), 1.25, 1.2, 0.96, 0.98, 0.97)
    found += rows(bench.quality(["same text"])[:1], 3.089)
    told = bench.tables(found[::-1]).splitlines()  # they come as they are measured, side by side
    recipe = "| fisher | global | least_squares |"
    assert f"{recipe} 1.50 (1.40-1.60) / 1.70 | 2.40 / 2.60 |" in told
    before, after = (
        told.index(f"{title} ({texts[0]}{more})")
        for title, more in (("Before the fine-tune", " / web text"), ("After it", ""))
    )
    assert f"{recipe}  | 1.50 (1.40-1.60) / 1.70 |" in told[before:after]
    assert "| LLM-Pruner | per_layer 4-25 | none | 3.09 |  |" in told[before:after]
    assert f"{recipe}  | 0.97 (0.96-0.98) |" in told[after:]
    assert not any(line.startswith("Blocks 4 to 25 alone") for line in told), "nothing was measured for it"


def test_of_recipes_that_differ_in_their_blocks_the_pruning_benchmark_goes_on_with_the_best(
    pruning_benchmark: Any,
) -> None:
    bench = pruning_benchmark
    tasks = bench.compensated(["same text"], [("fisher", "global")], bench.RATES, list(bench.WITH_BLOCKS))
    perplexities = dict(zip(bench.WITH_BLOCKS, (60.0, 57.0, 58.0), strict=False))
    rows = [
        bench.Row(*task.key, 0.2, perplexities.get(task.criterion, 59.0) - 50 * (task.settings.rate > 0.2), 1.5, 1.0)
        for task in tasks
    ]
    told = bench.ranked(rows, "criterion", "selection", "compensation")
    assert [recipe[0] for recipe in told] == ["fisher, 8% in blocks", "fisher", "fisher", "fisher"]


def test_what_is_fine_tuned_was_measured_before_it_with_every_seed(pruning_benchmark: Any) -> None:
    """Also a recipe of the middle blocks, whose first row is in a table of its own."""
    bench, middle = pruning_benchmark, ("fisher", f"global{pruning_benchmark.MIDDLE}", "least_squares")

    class Known:
        def rows(self, tasks: Any) -> list[Any]:
            is_middle = [task.key[1:4] == middle for task in tasks]
            return [
                bench.Row(*task.key, 0.2, 40.0 if best else 50.0, (1.5 if best else 2.0) + 0.1 * task.seed, 1.0)
                for task, best in zip(tasks, is_middle, strict=True)
            ]

    told = bench.tables(bench.every_part(Known(), ["same text", "web text"])).splitlines()
    before, after = (
        next(index for index, line in enumerate(told) if line.startswith(title))
        for title in ("Before the fine-tune", "After it")
    )
    recipes = [
        {tuple(line.split(" | ")[:3]) for line in part if line.startswith("| ")}
        for part in (told[before:after], told[after:])
    ]
    assert recipes[0] == recipes[1] and len(recipes[0]) >= 6
    assert f"| {' | '.join(middle)} |  | 1.60 (1.50-1.70) / 1.60 (1.50-1.70) |" in told[before:after]


def test_without_public_data_the_pruning_benchmark_divides_the_demos_own_text(pruning_benchmark: Any) -> None:
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
