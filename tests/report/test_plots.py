"""The plots: what a reader concludes from them is what was measured."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from made_records import made_layer, made_prune
from made_run import BUDGET, SEARCH, TRIALS, MadeRun

from qpruner.report.plots.budget_axis import score_axis, size_ticks
from qpruner.report.plots.model import first_method, importance, ranked, sensitivities, shares
from qpruner.report.plots.of_run import charts
from qpruner.report.search_progress import hypervolume_so_far
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.records import SearchRecord, SensitivityRecord, StageState
from qpruner.search.trial_records import write_trial


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run", num_trials=12, num_blocks=2)


def chart_of(made: MadeRun, name: str) -> Any:
    [chart] = [chart for chart in charts(read_snapshot(made.run)) if chart.name == name]
    return chart


def values_of(made: MadeRun, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chart_of(made, name).spec["data"]["values"]
    return found


def drawn(made: MadeRun, name: str, width: int = 640) -> str:
    return str(vl_convert.vegalite_to_svg(json.dumps(chart_of(made, name).complete | {"width": width})))


def change_search(made: MadeRun, **fields: Any) -> SearchRecord:
    record = made.run.read_record("search", SearchRecord)
    assert record
    made.run.write_record("search", record.model_copy(update=fields))
    return record


def change_state(made: MadeRun, **fields: Any) -> None:
    assert made.state.search
    made.run.write_state(made.state.model_copy(update={"search": made.state.search.model_copy(update=fields)}))


def test_every_trial_is_in_the_plots_and_the_best_is_marked(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=80, num_blocks=2)
    run = read_snapshot(made.run)
    specs = {chart.name: chart.spec for chart in charts(run)}
    points = specs["pareto"]["data"]["values"]
    assert len(points) == sum(1 for trial in run.trials if trial.rungs) == 79
    assert run.results.search
    assert [point["trial"] for point in points if point["best"]] == [run.results.search.best_index]
    kinds = Counter(point["kind"] for point in points)
    assert kinds["control"] == 3 and kinds["stopped early"] == sum(trial.status == "stopped" for trial in run.trials)
    bars = specs["timeline"]["data"]["values"]
    by_slot: dict[int, list[tuple[float, float]]] = {}
    for bar in bars:
        by_slot.setdefault(bar["slot"], []).append((bar["start"], bar["end"]))
    assert len(bars) == 80 and len(by_slot) == 8
    assert all(one[1] <= other[0] for spans in by_slot.values() for one, other in pairwise(sorted(spans)))


def test_the_front_joins_what_none_of_fewer_bytes_beats(made: MadeRun) -> None:
    line = chart_of(made, "pareto").spec["layer"][1]["data"]["values"]
    finished = [trial for trial in made.trials if trial.status == "finished"]
    best, expected = float("inf"), []
    for trial in sorted(finished, key=lambda trial: (trial.plan_bytes, trial.rungs[-1].loss)):
        if trial.rungs[-1].loss < best:
            best = trial.rungs[-1].loss
            expected.append((trial.plan_bytes / 1e6 - BUDGET / 1e6, best))
    np.testing.assert_allclose([(each["distance"], each["score"]) for each in line], expected)


@pytest.mark.parametrize(("largest", "side"), [(True, "end"), (False, "start")])
def test_the_edge_does_not_cut_the_winners_label(made: MadeRun, largest: bool, side: str) -> None:
    """On a telephone the largest plan's label lost its last letter."""
    finished = sorted((trial for trial in made.trials if trial.status == "finished"), key=lambda each: each.plan_bytes)
    best = finished[-1 if largest else 0]
    change_search(made, best_index=best.index, best_plan=best.plan)
    change_state(made, budget_bytes=finished[-1].plan_bytes)
    halo, label = re.findall(r"<text([^>]*)>winner</text>", drawn(made, "pareto", 320))
    assert f'text-anchor="{side}"' in halo and f'text-anchor="{side}"' in label


@pytest.mark.parametrize("name", ["pareto", "progress", "rungs"])
def test_one_far_control_does_not_press_the_others_together(made: MadeRun, name: str) -> None:
    trial = made.trials[0]
    rungs = tuple(rung.model_copy(update={"loss": rung.loss + 9}) for rung in trial.rungs)
    assert "at the edge" not in chart_of(made, name).caption
    write_trial(made.run.trials / TRIALS, trial.model_copy(update={"rungs": rungs}))
    chart = chart_of(made, name)
    shown = [point["score"] for point in chart.spec["data"]["values"] if point["trial"]]
    scales = [layer["encoding"]["y"]["scale"] for layer in chart.spec["layer"] if "y" in layer["encoding"]]
    assert all(scale["clamp"] and scale["domain"][1] < 2 * max(shown) - min(shown) for scale in scales)
    assert re.search(r" [13] far worse scores? (is|are) drawn at the edge\.", chart.caption)
    assert chart.png().startswith(b"\x89PNG")


def test_of_a_search_by_accuracy_what_is_far_lies_below() -> None:
    axis, num_beyond = score_axis([0.5, 0.71, 0.72, 0.73], "accuracy", "accuracy")
    assert 0.70 < axis["scale"]["domain"][0] < 0.71 and axis["scale"]["domain"][1] == 0.73 and num_beyond == 1
    assert score_axis([0.71, 0.72, 0.73], "accuracy", "accuracy")[1] == 0
    near = [2.34, 2.36, 2.345, 2.355, 2.35, 2.42]
    assert score_axis([*near, 2.50], "loss", "loss")[1] == 0, "the others have half the plot"
    assert score_axis([*near, 2.60], "loss", "loss")[1] == 1


def test_the_best_so_far_goes_on_to_the_last_trial(made: MadeRun) -> None:
    last = made.trials[-1]
    for status in ("finished", "stopped"):
        write_trial(made.run.trials / TRIALS, last.model_copy(update={"status": status}))
        line = chart_of(made, "progress").spec["layer"][0]["data"]["values"]
        assert {each["kind"]: each["trial"] for each in line} == {"searched": 11, "control": 11}
        assert len(line) == len({(each["kind"], each["trial"]) for each in line})


@pytest.mark.parametrize("name", ["pareto", "progress"])
def test_the_winner_is_marked_though_another_scored_better(made: MadeRun, name: str) -> None:
    """Fresh rows chose it: beside the best score so far it looks like a mistake, and unmarked it is not found."""
    change_search(made, best_index=9, best_plan=made.trials[9].plan)
    assert [point["trial"] for point in values_of(made, name) if point["best"]] == [9]
    assert "another trial may have a better score" in chart_of(made, name).caption
    assert drawn(made, name).count(">winner</text>") == 2, "and its halo"


def test_plans_near_the_budget_stand_apart(made: MadeRun) -> None:
    """A uniform plan of 4 bits far from it pressed them into its line."""
    scored = [trial for trial in made.trials if trial.rungs]
    for trial, below in zip(scored, (17_600_000, *range(100_000, 2_000_000, 170_000)), strict=False):
        write_trial(made.run.trials / TRIALS, trial.model_copy(update={"plan_bytes": BUDGET - below}))
    svg = drawn(made, "pareto")
    places = set(re.findall(r'aria-roledescription="point" transform="translate\(([\d.]+),', svg))
    first, *near = sorted(map(float, places))
    assert len(near) == len(scored) - 1
    assert near[-1] - near[0] > 0.3 * (near[-1] - first), "of equal lengths a MB they had a twelfth of it"
    assert min(other - one for one, other in pairwise(near)) > 8


@pytest.mark.parametrize(
    ("sizes", "budget"), [([109.54, 126.9, 127.07], 127.11), ([126.9, 127.07], 127.08), ([0.1, 0.099], 0.1001)]
)
def test_sizes_on_the_axis_are_told_apart(sizes: list[float], budget: float) -> None:
    ticks, decimals = size_ticks(sizes, budget, (budget - min(sizes)) / 50)
    assert len({f"{tick:.{decimals}f}" for tick in ticks}) == len(ticks) == 6
    assert ticks[0] == pytest.approx(min(sizes)) and ticks[-1] == pytest.approx(budget)
    assert size_ticks([budget], budget, 1.0) == ([budget], 1)


def test_the_hypervolume_grows_and_is_that_of_the_front(tmp_path: Path) -> None:
    trials = MadeRun(tmp_path / "run", num_trials=20).trials
    every, controls = (hypervolume_so_far(trials, "loss", BUDGET, of_controls) for of_controls in (False, True))
    assert every == sorted(every) and controls[2:] == [controls[2]] * 18, "the first three are the controls"
    assert every[:3] == controls[:3] and every[-1] > controls[-1]
    finished = [trial for trial in trials if trial.status == "finished"]
    smallest = min((trial.plan_bytes, trial.rungs[-1].loss) for trial in finished)
    sizes = np.linspace(smallest[0], BUDGET, 2001)[:-1]
    best = [min(trial.rungs[-1].loss for trial in finished if trial.plan_bytes <= size) for size in sizes]
    assert every[-1] == pytest.approx(smallest[1] - statistics.mean(best), abs=1e-3)
    assert hypervolume_so_far([trials[7]], "loss", BUDGET) == [0.0], "it failed"


def test_a_given_plan_is_shown_beside_the_trials_of_the_search(made: MadeRun) -> None:
    before = values_of(made, "progress")
    given = made.trials[1].model_copy(update={"index": 12, "origin": "given", "search": "9" * 16})
    write_trial(made.run.trials / TRIALS, given)
    change_search(made, best_index=12, best_origin="given", best_plan=given.plan, num_trials=1)
    change_state(made, search="9" * 16, beside=SEARCH)
    points = values_of(made, "progress")
    assert points[:-1] == [point | {"best": False} for point in before], "the search's trials are still there"
    assert (points[-1]["trial"], points[-1]["kind"]) == (12, "given plan")
    [ringed] = [point for point in values_of(made, "pareto") if point["best"]]
    assert (ringed["trial"], ringed["kind"]) == (12, "given plan") and ">given plan</text>" in drawn(made, "pareto")


# ---- the model


@pytest.mark.parametrize("best", ["seed-kl", "seed-first-order"])
def test_the_map_opens_on_the_best_seeds_sensitivity(made: MadeRun, best: str) -> None:
    record = change_search(made)
    losses = {best: 3.0, "uniform-4": 2.9}
    scored = [each.model_copy(update={"loss": losses.get(each.origin, 3.1)}) for each in record.confirmations]
    change_search(made, confirmations=tuple(scored))
    assert first_method(read_snapshot(made.run)) == best.removeprefix("seed-").replace("-", "_")


@pytest.mark.parametrize(("num_trials", "method"), [(12, "first_order"), (200, "kl")])
def test_before_fresh_rows_it_opens_on_what_trials_agree_with(num_trials: int, method: str, tmp_path: Path) -> None:
    """Else on a quantization error: mutual information comes first in the record, and predicts none."""
    begun = {"search": StageState(state="running", started=0.0)}
    noises = {"mutual_information": 1.5, "first_order": 2.0, "kl": 0.1}
    made = MadeRun(tmp_path / "run", num_trials, 3, until="sensitivity", stages=begun, noises=noises)
    assert first_method(read_snapshot(made.run)) == method


def test_shades_begin_at_the_least_where_none_is_below_zero() -> None:
    """Else a measure that is nearly the same for all groups is one dark field, whatever plan it suggests."""
    assert shares([0.7, 0.8, 0.9]) == pytest.approx([0.0, 0.5, 1.0])
    assert shares([-0.1, 0.0, 0.2]) == pytest.approx([-0.5, 0.0, 1.0])
    assert shares([0.3, 0.3]) == [1.0, 1.0] and not any(shares([0.0, 0.0]))


def test_the_map_of_all_sensitivities_is_drawn(made: MadeRun) -> None:
    record = made.run.read_record("sensitivity", SensitivityRecord)
    assert record
    chart = sensitivities(record)
    assert {each["row"] for each in chart.spec["data"]["values"]} == {
        "mutual information, 4 bits", "first order, 4 bits", "kl, 4 bits",
    }  # fmt: skip
    assert chart.png().startswith(b"\x89PNG")


def test_a_run_without_sensitivities_has_its_bits(made: MadeRun) -> None:
    """As one with a single bit-width, or with `sensitivity.methods: []`."""
    record = made.run.read_record("sensitivity", SensitivityRecord)
    assert record
    made.run.write_record("sensitivity", record.model_copy(update={"methods": {}}))
    assert chart_of(made, "winner").title == "Bits by layer"


def panels_of(record: Any, scores: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    chart = importance(record, scores)
    assert chart.png().startswith(b"\x89PNG")
    return {f"{number} {each['title']}": each["data"]["values"] for number, each in enumerate(chart.spec["hconcat"])}


def test_importance_is_shown_ranked_beside_what_was_kept() -> None:
    generator = np.random.default_rng(0)
    scores = {"0.attention": generator.gamma(2.0, 1.0, 4), "0.mlp": np.array([0.0] * 100 + [1.0] * 100)}
    record = made_prune(made_layer(0, 3, 150), made_layer(1, 4, 200))
    found = panels_of(record, scores)
    assert list(found) == ["0 key/value groups", "1 kept", "2 MLP channels", "3 kept"]
    shown = [each["importance"] for each in found["0 key/value groups"]]
    assert shown == sorted(shown) and {each["block"] for each in found["0 key/value groups"]} == {0}
    np.testing.assert_allclose(sorted(set(shown)), np.log10(np.sort(scores["0.attention"])), atol=1e-3)
    assert [each["value"] for each in found["1 kept"]] == [0.75, 1.0]
    assert [each["value"] for each in found["3 kept"]] == [0.75, 1.0]
    assert found["2 MLP channels"][0]["importance"] is None, "log10 of zero would make all other colours the same"


def test_many_units_are_averaged_into_columns() -> None:
    units = np.random.default_rng(0).gamma(2.0, 1.0, 200)
    row = ranked(units)
    assert len(row) == 32 and list(row) == sorted(row)
    assert row[0] == pytest.approx(np.sort(units)[:7].mean())


def test_experts_and_whole_blocks_have_panels_of_their_own() -> None:
    record = made_prune(made_layer(0, 4, 200, experts=6), made_layer(1, 0, 0), made_layer(2, 4, 0, experts=0))
    blocks = np.array([[0, 0.5], [1, 0.1], [2, 0.3]])
    scores = {"0.expert": np.arange(1.0, 9.0), "block": blocks}
    found = panels_of(record.model_copy(update={"dropped_blocks": (1,)}), scores)
    assert list(found) == ["0 experts", "1 kept", "2 whole blocks"]
    assert [each["value"] for each in found["1 kept"]] == [0.75, 1.0, 0.0], "without experts none is lost"
    assert [(each["value"], each["gone"]) for each in found["2 whole blocks"]] == [
        (0.5, False),
        (0.1, True),
        (0.3, False),
    ]
    assert panels_of(record, {}).keys() == {"0 key/value groups", "1 kept", "2 MLP channels", "3 kept"}
