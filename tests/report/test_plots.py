"""The plots show what was measured."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from made_records import made_layer, made_prune
from made_run import STAGE, MadeRun, made_methods

from qpruner.plans.plan import PrecisionPlan
from qpruner.quantization.formats import format_of
from qpruner.report.plots.chart import Chart
from qpruner.report.plots.plans import costs_of, kept_by_block, plan_bars
from qpruner.report.plots.search import CUT_COLORS
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
    return str(
        vl_convert.vegalite_to_svg(json.dumps(chart_of(made, name).complete | {"width": width}))
    )


def test_every_trial_is_in_the_plot_with_the_front_and_the_best(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=80, num_blocks=2)
    points = values_of(made, "pareto")
    assert len(points) == sum(1 for trial in made.trials if trial.rungs) == 79
    assert [point["trial"] for point in points if point["best"]] == [
        made.record("search").best_index
    ]
    kinds = Counter(point["kind"] for point in points)
    assert kinds["control"] == 3
    assert kinds["stopped early"] == sum(trial.status == "stopped" for trial in made.trials)
    finished = [
        (trial.plan_bytes / 1e6, trial.rungs[-1].loss)
        for trial in made.trials
        if trial.status == "finished"
    ]
    expected = [
        each
        for each in sorted(finished)
        if all(other >= each[1] for size, other in finished if size <= each[0])
    ]
    line = chart_of(made, "pareto").spec["layer"][1]["data"]["values"]
    np.testing.assert_allclose([(each["megabytes"], each["score"]) for each in line], expected)


def test_the_edge_does_not_cut_the_winners_label(made: MadeRun) -> None:
    """On a phone the largest plan's label lost its last letter."""
    finished = sorted(
        (trial for trial in made.trials if trial.status == "finished"),
        key=lambda each: each.plan_bytes,
    )
    made.change_search(budget_bytes=finished[-1].plan_bytes)
    for best, side in ((finished[-1], "end"), (finished[0], "start")):
        made.win(best)
        halo, label = re.findall(r"<text([^>]*)>winner[^<]*</text>", drawn(made, "pareto", 320))
        assert f'text-anchor="{side}"' in halo
        assert f'text-anchor="{side}"' in label


@pytest.mark.parametrize(
    ("metric", "far", "is_cut"), [("loss", 9, True), ("loss", 0, False), ("accuracy", -9, True)]
)
def test_one_far_control_does_not_press_the_others_together(
    made: MadeRun, metric: str, far: int, is_cut: bool
) -> None:
    """In a search by accuracy, outliers lie below."""
    made.change_search(metric=metric)
    for trial in made.trials:
        shift = far if trial.index == 0 else 0
        rungs = [
            rung.model_copy(update={"loss": rung.loss + shift, "accuracy": rung.loss + shift})
            for rung in trial.rungs
        ]
        made.write(trial, rungs=tuple(rungs))
    chart = chart_of(made, "pareto")
    shown = [point["score"] for point in chart.spec["data"]["values"] if point["trial"]]
    scales = [
        layer["encoding"]["y"]["scale"] for layer in chart.spec["layer"] if "y" in layer["encoding"]
    ]
    assert all(("clamp" in scale) == is_cut for scale in scales)
    if is_cut:
        low, high = scales[0]["domain"]
        assert min(shown) - 1 < low <= min(shown)
        assert max(shown) <= high < max(shown) + 1
    assert chart.png().startswith(b"\x89PNG")


def test_the_axis_reaches_the_best_of_each_cut(made: MadeRun) -> None:
    """A cut that costs much is shown at its loss, its worse trials at the axis's end."""
    for trial, loss in zip(made.trials[:2], (9.0, 12.0), strict=True):
        rungs = tuple(rung.model_copy(update={"loss": loss}) for rung in trial.rungs)
        made.write(trial, cut="base", rungs=rungs)
    assert chart_of(made, "pareto").spec["layer"][1]["encoding"]["y"]["scale"]["domain"][1] == 9.0


def test_the_winner_is_marked(made: MadeRun) -> None:
    """Fresh rows chose the winner, so it may not have the best score; without a mark nobody would
    find it."""
    made.win(made.trials[9])
    assert [point["trial"] for point in values_of(made, "pareto") if point["best"]] == [9]
    assert "another trial may have a better score" in chart_of(made, "pareto").caption
    assert drawn(made, "pareto").count(">winner</text>") == 2, "and its halo"


def test_trials_have_the_colour_of_their_cut(made: MadeRun) -> None:
    made.write(made.trials[0], cut="base")
    picture = drawn(made, "pareto")
    texts = re.findall(r">([^<]+)</text>", picture)
    assert [text for text in texts if text.endswith("pruned")] == ["not pruned", "20 % pruned"]
    assert all(colour in picture for colour in CUT_COLORS[:2])
    assert CUT_COLORS[2] not in picture


def test_a_given_plan_is_marked(made: MadeRun) -> None:
    given = made.trials[1].model_copy(update={"index": 12, "origin": "given", "search": "9" * 16})
    made.write(given)
    made.win(given, num_trials=1)
    made.change_search(search="9" * 16)
    [ringed] = [point for point in values_of(made, "pareto") if point["best"]]
    assert ringed["trial"] == 12
    assert ringed["kind"] == "given plan"
    assert ">given plan</text>" in drawn(made, "pareto")


def test_names_of_controls_do_not_overlap(made: MadeRun) -> None:
    for trial in made.trials[:3]:
        made.write(trial, rungs=made.trials[0].rungs, plan_bytes=made.trials[0].plan_bytes)
    below = [point["below"] for point in values_of(made, "pareto") if point["kind"] == "control"]
    assert all(abs(one - other) >= 12 for one, other in itertools.combinations(below, 2))
    picture = drawn(made, "pareto")
    assert all(
        picture.count(f">{name}</text>") == 2
        for name in ("uniform", "knapsack", "the paper's flow")
    )


# ---- the model


def test_every_plan_is_a_row_of_bars_in_its_formats_colours() -> None:
    """Embeddings and head are bars too; the legend has each used format once, smallest first."""
    plan = {
        "embeddings": "int8",
        "layers.0.attention": "nf4",
        "layers.1.mlp": "bf16",
        "head": "bf16",
    }
    methods = made_methods(
        {"nf4": (None, 0.5, -0.3, None), "int8": (0.2, 0.1, 0.1, None), "bf16": (0.0,) * 4}, "kl"
    )
    measured = SensitivityRecord(**STAGE, groups=tuple(plan), methods=methods)
    assert costs_of(methods["kl"]) == [0.2, 0.5, -0.3, None]
    shown = {
        "3: winner": PrecisionPlan.from_dict(plan, "cut-10"),
        "1: gp": PrecisionPlan.from_dict(plan),
    }
    chart = plan_bars(shown, measured)
    drawn = str(vl_convert.vegalite_to_svg(json.dumps(chart.complete)))
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
    assert [text for text in texts if text in ("nf4", "int8", "bf16")] == ["nf4", "int8", "bf16"]
    assert [text for text in texts if "pruned" in text] == [
        "3: winner, 10 % pruned",
        "1: gp, not pruned",
    ]
    for name in plan.values():
        assert f'fill="{format_of(name).colour}"' in drawn
    assert chart.png().startswith(b"\x89PNG")
    assert plan_bars(shown, None).title == "Formats by group", "with a single format, say"


def test_what_a_cut_kept_of_each_block_is_drawn() -> None:
    chart = kept_by_block(made_prune(made_layer(0, 3, 150), made_layer(1, 4, 200)).cuts)
    values = chart.spec["vconcat"][0]["data"]["values"]
    assert {(each["cut"], each["group"], each["kept"]) for each in values} == {
        ("20 % pruned", "0", 0.75),
        ("20 % pruned", "1", 1.0),
    }
    assert chart.png().startswith(b"\x89PNG")
