"""The plots show what was measured."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vl_convert
from made_records import made_cut, made_layer
from made_run import SEARCH, STAGE, MadeRun, made_methods, results_of, searched_row, snapshot

from qpruner.quantization.formats import format_of
from qpruner.report.plots.chart import Chart
from qpruner.report.plots.model import (
    costs_of,
    importance,
    in_columns,
    load_importance,
    plan_map,
    save_importance,
    shades,
)
from qpruner.report.sections import sections
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.records import SensitivityRecord


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run", num_trials=12, num_blocks=2)


def chart_of(made: MadeRun, name: str) -> Chart:
    parts = [part for section in sections(read_snapshot(made.run)) for part in section.parts]
    [chart] = [part for part in parts if isinstance(part, Chart) and part.name == name]
    return chart


def values_of(made: MadeRun, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chart_of(made, name).spec["data"]["values"]
    return found


def drawn(made: MadeRun, name: str, width: int = 640) -> str:
    return str(vl_convert.vegalite_to_svg(json.dumps(chart_of(made, name).complete | {"width": width})))


def test_every_trial_is_in_the_plot_with_the_front_and_the_best(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=80, num_blocks=2)
    points = values_of(made, "pareto")
    assert len(points) == sum(1 for trial in made.trials if trial.rungs) == 79
    assert [point["trial"] for point in points if point["best"]] == [made.record("search").best_index]
    kinds = Counter(point["kind"] for point in points)
    assert kinds["control"] == 3 and kinds["stopped early"] == sum(trial.status == "stopped" for trial in made.trials)
    finished = [(trial.plan_bytes / 1e6, trial.rungs[-1].loss) for trial in made.trials if trial.status == "finished"]
    expected = [
        each for each in sorted(finished) if all(other >= each[1] for size, other in finished if size <= each[0])
    ]
    line = chart_of(made, "pareto").spec["layer"][1]["data"]["values"]
    np.testing.assert_allclose([(each["megabytes"], each["score"]) for each in line], expected)


def test_the_edge_does_not_cut_the_winners_label(made: MadeRun) -> None:
    """On a phone the largest plan's label lost its last letter."""
    finished = sorted((trial for trial in made.trials if trial.status == "finished"), key=lambda each: each.plan_bytes)
    made.change_search(budget_bytes=finished[-1].plan_bytes)
    for best, side in ((finished[-1], "end"), (finished[0], "start")):
        made.win(best)
        halo, label = re.findall(r"<text([^>]*)>winner</text>", drawn(made, "pareto", 320))
        assert f'text-anchor="{side}"' in halo and f'text-anchor="{side}"' in label


@pytest.mark.parametrize(("metric", "far", "is_cut"), [("loss", 9, True), ("loss", 0, False), ("accuracy", -9, True)])
@pytest.mark.parametrize("name", ["pareto", "progress"])
def test_one_far_control_does_not_press_the_others_together(
    made: MadeRun, name: str, metric: str, far: int, is_cut: bool
) -> None:
    """In a search by accuracy, outliers lie below."""
    made.change_search(metric=metric)
    for trial in made.trials:
        shift = far if trial.index == 0 else 0
        rungs = [
            rung.model_copy(update={"loss": rung.loss + shift, "accuracy": rung.loss + shift}) for rung in trial.rungs
        ]
        made.write(trial, rungs=tuple(rungs))
    chart = chart_of(made, name)
    shown = [point["score"] for point in chart.spec["data"]["values"] if point["trial"]]
    scales = [layer["encoding"]["y"]["scale"] for layer in chart.spec["layer"] if "y" in layer["encoding"]]
    assert all(("clamp" in scale) == is_cut for scale in scales)
    if is_cut:
        low, high = scales[0]["domain"]
        assert min(shown) - 1 < low <= min(shown) and max(shown) <= high < max(shown) + 1
    assert chart.png().startswith(b"\x89PNG")


def test_the_best_so_far_goes_on_and_the_winner_is_marked(made: MadeRun) -> None:
    """Fresh rows chose the winner, so it may not have the best score; without a mark nobody would find it."""
    made.win(made.trials[9])
    for name in ("pareto", "progress"):
        assert [point["trial"] for point in values_of(made, name) if point["best"]] == [9]
        assert "another trial may have a better score" in chart_of(made, name).caption
        assert drawn(made, name).count(">winner</text>") == 2, "and its halo"
    for status in ("finished", "stopped"):
        made.write(made.trials[-1], status=status)
        line = chart_of(made, "progress").spec["layer"][0]["data"]["values"]
        assert {each["kind"]: each["trial"] for each in line} == {"searched": 11, "control": 11}
        assert len(line) == len({(each["kind"], each["trial"]) for each in line})


def test_a_given_plan_is_shown_beside_the_trials_of_the_search(made: MadeRun) -> None:
    before = values_of(made, "progress")
    given = made.trials[1].model_copy(update={"index": 12, "origin": "given", "search": "9" * 16})
    made.write(given)
    made.win(given, num_trials=1)
    made.change_search(search="9" * 16, beside=SEARCH)
    points = values_of(made, "progress")
    assert points[:-1] == [point | {"best": False} for point in before], "the search's trials are still there"
    assert (points[-1]["trial"], points[-1]["kind"]) == (12, "given plan")
    [ringed] = [point for point in values_of(made, "pareto") if point["best"]]
    assert (ringed["trial"], ringed["kind"]) == (12, "given plan") and ">given plan</text>" in drawn(made, "pareto")


# ---- the model


def test_shades_begin_at_the_least_where_none_is_below_zero(made: MadeRun) -> None:
    """Otherwise a measure that is nearly the same for all groups would be one dark field."""
    assert shades([0.7, 0.8, 0.9]) == pytest.approx([0.0, 0.5, 1.0])
    assert shades([-0.1, 0.0, 0.2]) == pytest.approx([-0.5, 0.0, 1.0])
    assert shades([0.3, 0.3]) == [1.0, 1.0] and not any(shades([0.0, 0.0]))
    made.change("sensitivity", methods={})
    assert chart_of(made, "winner").title == "Formats by layer", "with a single format, say"


def test_a_plan_is_drawn_in_the_colours_of_its_formats() -> None:
    """Embeddings and head are rows of their own; the legend has each used format once, smallest first."""
    plan = {"embeddings": "int8", "layers.0.attention": "nf4", "layers.1.mlp": "bf16", "head": "bf16"}
    methods = made_methods({"nf4": (None, 0.5, 0.3, None), "int8": (0.2, 0.1, 0.1, None), "bf16": (0.0,) * 4}, "kl")
    measured = SensitivityRecord(**STAGE, groups=tuple(plan), methods=methods)
    run = snapshot(results_of(searched_row([1.0], plan=plan)).model_copy(update={"sensitivity": measured}))
    assert costs_of(methods["kl"]) == [0.2, 0.5, 0.3, None]
    chart = plan_map(run, plan)
    drawn = str(vl_convert.vegalite_to_svg(json.dumps(chart.complete)))
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
    assert [text for text in texts if text in ("nf4", "int8", "bf16")] == ["nf4", "int8", "bf16"]
    first = texts.index("embeddings")
    assert texts[first : first + 4] == ["embeddings", "0", "1", "head"]
    letters = [text for text in texts if text in ("4", "8", "F")]
    assert sorted(letters) == ["4", "8", "F", "F"]
    for name in plan.values():
        assert f'fill="{format_of(name).colour}"' in drawn and f'fill="{format_of(name).ink}"' in drawn
    assert re.search(r'embeddings; format: int8; [^>]* d="M0,0h124v17', drawn), "it fills its row of two columns"
    assert chart.png().startswith(b"\x89PNG")


def panels_of(record: Any, scores: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    chart = importance(record, scores)
    assert chart.png().startswith(b"\x89PNG")
    return {f"{number} {each['title']}": each["data"]["values"] for number, each in enumerate(chart.spec["hconcat"])}


def test_importance_is_shown_ranked_beside_what_was_kept() -> None:
    generator = np.random.default_rng(0)
    scores = {"0.attention": generator.gamma(2.0, 1.0, 4), "0.mlp": np.array([0.0] * 100 + [1.0] * 100)}
    record = made_cut(made_layer(0, 3, 150), made_layer(1, 4, 200))
    found = panels_of(record, scores)
    assert list(found) == ["0 key/value groups", "1 kept", "2 MLP channels", "3 kept"]
    shown = [each["importance"] for each in found["0 key/value groups"]]
    assert shown == sorted(shown) and {each["block"] for each in found["0 key/value groups"]} == {0}
    np.testing.assert_allclose(sorted(set(shown)), np.log10(np.sort(scores["0.attention"])), atol=1e-3)
    assert [each["value"] for each in found["1 kept"]] == [0.75, 1.0]
    assert found["2 MLP channels"][0]["importance"] is None, "log10 of zero would make all other colours the same"
    units = generator.gamma(2.0, 1.0, 200)
    assert len(in_columns(units)) == 32 and in_columns(units)[0] == pytest.approx(np.sort(units)[:7].mean())


def test_experts_and_whole_blocks_have_panels_of_their_own() -> None:
    record = made_cut(made_layer(0, 4, 200, experts=6), made_layer(1, 0, 0), made_layer(2, 4, 0, experts=0))
    scores = {"0.expert": np.arange(1.0, 9.0), "block": np.array([[0, 0.5], [1, 0.1], [2, 0.3]])}
    found = panels_of(record.model_copy(update={"dropped_blocks": (1,)}), scores)
    assert list(found) == ["0 experts", "1 kept", "2 whole blocks"]
    assert [each["value"] for each in found["1 kept"]] == [0.75, 1.0, 0.0], "without experts none is lost"
    blocks = [(each["value"], each["gone"]) for each in found["2 whole blocks"]]
    assert blocks == [(0.5, False), (0.1, True), (0.3, False)]


def test_the_importance_that_is_written_is_read_back(tmp_path: Path) -> None:
    kinds = {"attention": torch.tensor([1.0, 2.5], dtype=torch.float64), "mlp": torch.rand(5, dtype=torch.float64)}
    save_importance(tmp_path, {3: kinds, 11: {"mlp": kinds["mlp"] * 2}}, {3: 0.25, 11: 0.5})
    found = load_importance(tmp_path)
    assert set(found) == {"3.attention", "3.mlp", "11.mlp", "block"}
    assert found["11.mlp"].tolist() == (kinds["mlp"] * 2).tolist()
    assert found["block"].tolist() == [[3, 0.25], [11, 0.5]]
