"""The page: self-contained, small, escaped, and there for runs that are not whole."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import jsonschema
import numpy as np
import pytest
import vl_convert
import yaml
from click.testing import CliRunner
from conftest import raw_config, with_key
from hub_server import Repository, serving
from huggingface_hub import ModelCard
from made_run import BUDGET, HOSTILE, STAGES, TRIALS, MadeRun, reported_run
from recorded_runs import trial as recorded_trial
from safetensors.numpy import save

import qpruner
from qpruner.cli.main import main
from qpruner.config.load import validate_config
from qpruner.config.schema import SensitivityMethod
from qpruner.errors import UserError
from qpruner.pipeline.run import run
from qpruner.plans.plan import PrecisionPlan
from qpruner.report import by_task, run_views, sections
from qpruner.report.card import other_base_remark
from qpruner.report.far import edge_of, edge_of_rungs
from qpruner.report.files import write_report
from qpruner.report.legend import terms
from qpruner.report.page import render
from qpruner.report.plots import charts
from qpruner.report.results_json import summary_of, summary_schema, summary_text
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.paths import OWN_DIGEST, RunDir
from qpruner.runs.records import (
    FrontPoint,
    PrepareRecord,
    PruneRecord,
    RungResult,
    SearchRecord,
    SensitivityRecord,
    StageState,
)
from qpruner.search.trial_records import write_trial

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 2_000_000
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Outline(HTMLParser):
    """Elements that are open, attributes that point somewhere, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.targets: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attributes:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "action", "srcset", "data", "poster", "aria-labelledby") or name.startswith(
                "on"
            ):
                self.targets.append((tag, name, value or ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes <{self._open[-1:]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reported_run(tmp_path_factory.mktemp("long") / "run")


def page_of(root: Path) -> str:
    return (root / "report.html").read_text(encoding="utf-8")


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_the_page_of_200_trials_is_one_small_file_that_loads_nothing(long_run: Path) -> None:
    page = page_of(long_run)
    assert len(page.encode()) < MAX_BYTES
    outline = Outline(page)
    assert max(outline.ids.values()) == 1
    for tag, name, value in outline.targets:
        if name == "aria-labelledby" or value.startswith("#"):
            assert value.removeprefix("#") in outline.ids, f"{tag} {name}={value} leads nowhere"
        else:
            raise AssertionError(f"{tag} loads {name}={value}")
    assert "link" not in outline.tags
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page


def test_the_page_answers_first_and_leaves_nothing_out(long_run: Path) -> None:
    outline = Outline(page_of(long_run))
    text = words(outline.text)
    results = json.loads((long_run / "results.json").read_text())
    assert text.index("The answer") < text.index("Quality by task") < text.index("The search")
    assert results["claim"].splitlines()[0] in text
    turns = r"[\d.]+ \([\d.]+-[\d.]+\) tokens/s"
    assert re.search(f"writes {turns}, base {turns}", text) and re.search(f"reads {turns}, base {turns}", text)
    assert "takes 140.0 MB, base 331.0 MB" in text and "on 2 CPU cores, one sequence, adapter on; in" in text
    assert f"budget {BUDGET / 1e6:.1f} MB (quantize.budget: fraction 0.5), adapter included" in text
    assert "92.0 MB" in text and "times smaller than the base model's 278.8 MB" in text
    assert outline.tags["tr"] > 200
    for each in ("qpruner run my.yaml --set search.max_trials=200", "2.13.0", "AMD EPYC 9555", "rank: 4"):
        assert each in text
    plots = {"task-1", "task-2", "winner", "pareto", "progress", "rungs", "timeline", "kept"}
    assert set(re.findall(r'<figure data-plot="([^"]+)"', page_of(long_run))) == plots


def test_the_final_table_s_figures_stand_under_one_another(long_run: Path) -> None:
    page = page_of(long_run)
    answer = page[page.index('<section id="answer"') : page.index('<section id="quality"')]
    assert '<th scope="col" class="number">test acc</th>' in answer, "the metric in the place of `test accuracy`"
    for heading in set(sections.HEADINGS) - {sections.TEST_ACCURACY}:
        number = "" if heading in ("row", "from") else ' class="number"'
        assert f'<th scope="col"{number}>{heading}</th>' in answer
    assert answer.count("<table>") == len(sections.TABLES) + 1, "and one of a single seed"


@pytest.mark.parametrize(("until", "mark"), [("search", "winner"), ("sensitivity", "best so far")])
def test_the_table_of_trials_marks_the_best_one_in_words(until: str, mark: str, tmp_path: Path) -> None:
    """A tint alone is lost to a screen reader, on paper and to the filter."""
    begun = {} if until == "search" else {"search": StageState(state="running", started=0.0)}
    made = MadeRun(tmp_path / "run", num_trials=9, num_blocks=2, until=until, stages=begun)
    write_report(made.run)
    page = page_of(tmp_path / "run")
    table = page[page.index('<table id="trials-table"') :]
    (marked,) = re.findall(rf'<tr[^>]*class="best">([^\n]*), {mark}</td>', table)
    best = read_snapshot(made.run).best_trial
    assert best and f">{best.index}</th>" in marked and table.count(f", {mark}<") == 1


def test_the_table_of_trials_has_reasons_where_there_are_some(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=9, num_blocks=2)
    pages = []
    for reason in ("loss is NaN", None):
        for trial in made.trials:
            write_trial(
                made.run.trials / TRIALS, trial.model_copy(update={"reason": reason if trial.index == 3 else None})
            )
        write_report(made.run)
        page = page_of(tmp_path / "run")
        pages.append(page[page.index('<table id="trials-table"') :])
    assert '<button type="button">reason</button>' in pages[0] and ">loss is NaN</td>" in pages[0]
    assert "reason" not in pages[1][: pages[1].index("</table>")]


@pytest.mark.parametrize(("num_trials", "box"), [(12, "scroll"), (13, "scroll tall")])
def test_a_dozen_trials_are_shown_whole(num_trials: int, box: str, tmp_path: Path) -> None:
    """In a box of its own the last of them would be cut in half."""
    write_report(MadeRun(tmp_path / "run", num_trials=num_trials, num_blocks=2).run)
    assert f'<div class="{box}" tabindex="0" role="region" aria-label="Trials">' in page_of(tmp_path / "run")


def test_every_trial_is_in_the_plots_and_the_best_one_is_marked(long_run: Path) -> None:
    run = read_snapshot(RunDir(long_run, create=False))
    specs = {chart.name: chart.spec for chart in charts(run)}
    points = specs["pareto"]["data"]["values"]
    assert len(points) == sum(1 for trial in run.trials if trial.rungs) == 199
    assert [point["trial"] for point in points if point["best"]] == [run.results.search.best_index]  # type: ignore[union-attr]
    kinds = Counter(point["kind"] for point in points)
    assert kinds["control"] == 3 and kinds["stopped early"] == sum(trial.status == "stopped" for trial in run.trials)
    bars = specs["timeline"]["data"]["values"]
    assert len(bars) == 200
    by_slot: dict[int, list[tuple[float, float]]] = {}
    for bar in bars:
        by_slot.setdefault(bar["slot"], []).append((bar["start"], bar["end"]))
    assert len(by_slot) == 8
    assert all(
        one[1] <= other[0] for spans in by_slot.values() for one, other in zip(spans, sorted(spans)[1:], strict=False)
    )


def opening(root: Path) -> tuple[str, str]:
    """The sensitivity that the map opens on, and what is told of its seed plan; the same in both reports."""
    run = read_snapshot(RunDir(root, create=False))
    [chart] = [chart for chart in charts(run) if chart.name == "winner"]
    told = chart.caption.split("begin at the least.")[1].strip()
    write_report(RunDir(root))
    assert told in words(Outline(page_of(root)).text) and told in (root / "report.md").read_text(encoding="utf-8")
    return chart.spec["params"][0]["value"], told


@pytest.mark.parametrize("best", ["seed-kl", "seed-first-order"])
def test_the_map_opens_on_the_best_seed_s_sensitivity_and_tells_how_far_the_winner_has_its_bits(
    best: str, tmp_path: Path
) -> None:
    made = MadeRun(tmp_path / "run", num_trials=12, num_blocks=3)
    record = made.run.read_record("search", SearchRecord)
    assert record
    losses = {best: 3.0, "uniform-4": 2.9}
    scored = [each.model_copy(update={"loss": losses.get(each.origin, 3.1)}) for each in record.confirmations]
    made.run.write_record("search", record.model_copy(update={"confirmations": tuple(scored)}))
    seed = next(trial for trial in made.trials if trial.origin == best)
    alike = sum(seed.plan[group] == bits for group, bits in record.best_plan.items())
    method, told = opening(tmp_path / "run")
    assert method == best.removeprefix("seed-").replace("-", "_")
    which = f"trial {seed.index}, the best seed on fresh rows"
    others = [
        f"{group} {bits} bits instead of {seed.plan[group]}"
        for group, bits in record.best_plan.items()
        if seed.plan[group] != bits
    ]
    rest = f"; others: {', '.join(others)}" if others else ""
    assert told == f"{alike} of 6 groups have the bits of the seed plan of {method} ({which}){rest}."


@pytest.mark.parametrize(("num_trials", "method", "seed"), [(12, "first_order", 2), (200, "kl", 1)])
def test_before_fresh_rows_the_map_opens_on_what_trials_show_and_else_on_a_quantization_error(
    num_trials: int, method: str, seed: int, tmp_path: Path
) -> None:
    """Mutual information comes first in the record, and tells of no error."""
    begun = {"search": StageState(state="running", started=0.0)}
    noises = {"mutual_information": 1.5, "first_order": 2.0, "kl": 0.1}
    MadeRun(tmp_path / "run", num_trials, num_blocks=3, until="sensitivity", stages=begun, noises=noises)
    opened, told = opening(tmp_path / "run")
    assert opened == method
    assert re.fullmatch(
        rf"\d+ of 6 groups have the bits of the seed plan of {method} \(trial {seed}\)(; others: .*)?\.", told
    )


def test_the_map_s_shades_begin_at_the_least_prediction_where_none_is_below_zero(tmp_path: Path) -> None:
    """Else a measure that is nearly the same for all groups is one dark field, whatever plan it suggests."""
    made = MadeRun(tmp_path / "run", num_trials=6, num_blocks=2, noises={"mutual_information": 0.6, "first_order": 0.6})
    record = made.run.read_record("sensitivity", SensitivityRecord)
    assert record
    rises = {"mutual_information": (0.9, 0.8, 1.0, 0.85), "first_order": (-0.5, 0.1, 1.0, 0.2)}
    methods = {
        name: method.model_copy(update={"values": {4: rises[name], 8: (0.0,) * 4}})
        for name, method in record.methods.items()
    }
    made.run.write_record("sensitivity", record.model_copy(update={"methods": methods}))
    [chart] = [chart for chart in charts(read_snapshot(made.run)) if chart.name == "winner"]
    about = chart.spec["params"][1]["value"]
    assert {name: (each["least"], each["largest"]) for name, each in about.items()} == {
        "mutual_information": (0.8, 1.0),
        "first_order": (0.0, 1.0),
    }
    assert chart.png().startswith(b"\x89PNG")


def test_a_run_without_sensitivities_has_a_report(tmp_path: Path) -> None:
    """As one with a single bit-width, or with `sensitivity.methods: []`."""
    made = MadeRun(tmp_path / "run", num_trials=6, num_blocks=2)
    record = made.run.read_record("sensitivity", SensitivityRecord)
    assert record
    made.run.write_record("sensitivity", record.model_copy(update={"methods": {}}))
    write_report(made.run)
    assert "Sensitivities" not in (tmp_path / "run" / "report.md").read_text()
    run = read_snapshot(made.run)
    [chart] = [chart for chart in charts(run) if chart.name == "winner"]
    assert chart.title == "Bits by layer"


def chart_of(made: MadeRun, name: str) -> Any:
    [chart] = [chart for chart in charts(read_snapshot(made.run)) if chart.name == name]
    return chart


def make_far(made: MadeRun, index: int, by: float = 9.0) -> list[float]:
    """Make a trial far worse at every rung; its losses then."""
    trial = made.trials[index]
    rungs = tuple(rung.model_copy(update={"loss": rung.loss + by}) for rung in trial.rungs)
    write_trial(made.run.trials / TRIALS, trial.model_copy(update={"rungs": rungs}))
    return [rung.loss for rung in rungs]


@pytest.mark.parametrize(("largest", "side"), [(True, "end"), (False, "start")])
def test_the_winner_s_label_stands_where_the_plot_s_edge_does_not_cut_it(
    largest: bool, side: str, tmp_path: Path
) -> None:
    """On a telephone the largest plan's label lost its last letter."""
    made = MadeRun(tmp_path / "run", num_trials=12, num_blocks=2)
    finished = sorted((trial for trial in made.trials if trial.status == "finished"), key=lambda each: each.plan_bytes)
    best = finished[-1 if largest else 0]
    record, search = made.run.read_record("search", SearchRecord), made.state.search
    assert record and search
    made.run.write_record("search", record.model_copy(update={"best_index": best.index, "best_plan": best.plan}))
    search = search.model_copy(update={"budget_bytes": finished[-1].plan_bytes})
    made.run.write_state(made.state.model_copy(update={"search": search}))
    drawn = vl_convert.vegalite_to_svg(json.dumps(chart_of(made, "pareto").complete | {"width": 320}))
    halo, label = re.findall(r"<text([^>]*)>winner</text>", drawn)
    assert f'text-anchor="{side}"' in halo and f'text-anchor="{side}"' in label


@pytest.mark.parametrize("name", ["pareto", "progress", "rungs"])
@pytest.mark.parametrize("num_trials", [12, 120])
def test_one_far_control_does_not_press_the_other_trials_together(num_trials: int, name: str, tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=num_trials, num_blocks=2)
    before = chart_of(made, name).spec["data"]["values"]
    losses = make_far(made, 0)
    after = chart_of(made, name)
    values = after.spec["data"]["values"]
    far = [point for point in values if point["trial"] == 0]
    others = [point for point in values if point["trial"]]
    shown = [point["shown"] for point in others if "far" not in point]
    for point in far:
        assert max(shown) < point["shown"] < max(shown) + 0.1 * (max(shown) - min(shown))
    assert [point["score"] for point in others] == [point["score"] for point in before if point["trial"]], "as scored"
    assert [point["score"] for point in far] == losses[-len(far) :] and len(far) == (3 if name == "rungs" else 1)
    assert [point["far"] for point in far] == [f"{loss:.4f}" for loss in losses[-len(far) :]]
    if name == "rungs":
        assert set(far[0]) == {"trial", "origin", "kind", "step", "score", "shown", "far"}, (
            "no field that nothing reads"
        )
    assert f"drawn at the edge with an arrow: trial 0 (uniform-4) {losses[-1]:.4f}" in after.caption
    ys = {layer["encoding"]["y"]["field"] for layer in after.spec["layer"] if "y" in layer["encoding"]}
    assert ys == {"shown"}, "nothing else stretches the axis"
    lines = [layer["data"]["values"] for layer in after.spec["layer"] if "data" in layer]
    assert all(each["shown"] <= far[0]["shown"] for line in lines for each in line if "shown" in each)
    arrow, value = (layer["encoding"]["text"] for layer in after.spec["layer"][-2:])
    assert arrow == {"value": "\u2191"} and value["field"] == "far"
    assert after.png().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["pareto", "progress", "rungs"])
def test_where_all_trials_lie_near_one_another_none_is_told_of_an_edge(name: str, tmp_path: Path) -> None:
    """Early rungs are worse for all: that makes no trial a far one."""
    chart = chart_of(MadeRun(tmp_path / "run", num_trials=12, num_blocks=2), name)
    values = chart.spec["data"]["values"]
    assert all(point["shown"] == point["score"] and "far" not in point for point in values)
    assert "at the edge" not in chart.caption and "\u2191" not in json.dumps(chart.spec)


def test_the_best_so_far_goes_on_to_the_last_trial_though_it_was_stopped(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=12, num_blocks=2)
    last = made.trials[-1].model_copy(update={"status": "stopped"})
    ends = {}
    for record in (made.trials[-1].model_copy(update={"status": "finished"}), last):
        write_trial(made.run.trials / TRIALS, record)
        line = chart_of(made, "progress").spec["layer"][0]["data"]["values"]
        ends[record.status] = {each["kind"]: each["trial"] for each in line}
        assert len(line) == len({(each["kind"], each["trial"]) for each in line})
    assert ends["stopped"] == ends["finished"] == {"searched": 11, "control": 11}


@pytest.mark.parametrize("name", ["pareto", "progress"])
def test_the_winner_is_marked_though_another_trial_has_a_better_score(name: str, tmp_path: Path) -> None:
    """Fresh rows chose it: beside the best score so far it looks like a mistake, and unmarked it is not found."""
    made = MadeRun(tmp_path / "run", num_trials=12, num_blocks=2)
    record = made.run.read_record("search", SearchRecord)
    assert record
    made.run.write_record("search", record.model_copy(update={"best_index": 9, "best_plan": made.trials[9].plan}))
    chart = chart_of(made, name)
    assert [point["trial"] for point in chart.spec["data"]["values"] if point["best"]] == [9]
    assert "The winner was chosen on fresh rows, so another trial may have a better score." in chart.caption
    drawn = vl_convert.vegalite_to_svg(json.dumps(chart.complete | {"width": 640}))
    assert drawn.count(">winner</text>") == 2, "and its halo"


def test_plans_near_the_budget_stand_apart_though_one_is_far_smaller(tmp_path: Path) -> None:
    """Most plans use the budget up; a uniform one of 4 bits far from it pressed them into its line."""
    made = MadeRun(tmp_path / "run", num_trials=12, num_blocks=2)
    assert made.state.search
    budget = made.state.search.budget_bytes
    scored = [trial for trial in made.trials if trial.rungs]
    for trial, below in zip(scored, (17_600_000, *range(100_000, 2_000_000, 170_000)), strict=False):
        write_trial(made.run.trials / TRIALS, trial.model_copy(update={"plan_bytes": budget - below}))
    drawn = vl_convert.vegalite_to_svg(json.dumps(chart_of(made, "pareto").complete | {"width": 640}))
    places = set(re.findall(r'aria-roledescription="point" transform="translate\(([\d.]+),', drawn))
    first, *near = sorted(map(float, places))
    assert len(near) == len(scored) - 1
    assert near[-1] - near[0] > 0.3 * (near[-1] - first), "of equal lengths a MB they had a twelfth of it"
    assert min(other - one for one, other in pairwise(near)) > 8


def test_the_budget_s_name_stands_where_no_arrow_does(tmp_path: Path) -> None:
    """A far trial at the budget has its arrow at the upper end of the budget's line."""
    made = MadeRun(tmp_path / "run", num_trials=12, num_blocks=2)
    make_far(made, 0)
    search = made.state.search
    assert search
    search = search.model_copy(update={"budget_bytes": made.trials[0].plan_bytes})
    made.run.write_state(made.state.model_copy(update={"search": search}))
    drawn = vl_convert.vegalite_to_svg(json.dumps(chart_of(made, "pareto").complete | {"width": 640}))
    places = re.findall(r'<text[^>]*transform="translate\(([\d.-]+),([\d.-]+)\)[^>]*>(budget|\u2191)</text>', drawn)
    (one, budget), (other, arrow) = sorted((name, (float(x), float(y))) for x, y, name in places)
    assert (one, other) == ("budget", "\u2191") and abs(budget[1] - arrow[1]) > 60


def test_scores_that_would_cover_one_another_stand_in_the_text_alone(tmp_path: Path) -> None:
    """Two far trials lie at the same place at each rung."""
    made = MadeRun(tmp_path / "run", num_trials=40, num_blocks=2)
    losses = {index: make_far(made, index, by) for index, by in ((0, 8.0), (30, 9.0))}
    for name in ("progress", "rungs"):
        chart = chart_of(made, name)
        far = {point["trial"]: point["far"] for point in chart.spec["data"]["values"] if "far" in point}
        told = {index: f"{found[-1]:.4f}" for index, found in losses.items()}
        assert far == (told if name == "progress" else {0: "", 30: ""})
        assert all(each in chart.caption for each in told.values())


def test_a_trial_that_was_stopped_far_off_has_an_arrow_without_its_score(tmp_path: Path) -> None:
    """There may be many."""
    made = MadeRun(tmp_path / "run", num_trials=40, num_blocks=2)
    stopped = next(trial.index for trial in made.trials if trial.status == "stopped")
    loss = make_far(made, stopped)[-1]
    chart = chart_of(made, "rungs")
    assert {point["far"] for point in chart.spec["data"]["values"] if point["trial"] == stopped} == {""}
    assert f"trial {stopped} (gp) {loss:.4f}." in chart.caption
    assert chart.spec["layer"][-1]["encoding"]["text"] == {"value": "\u2191"}, "Vega warns of a layer without data"


def test_a_score_of_fewer_steps_is_not_called_worse(tmp_path: Path) -> None:
    """At its own step the trial may have been among the best; from rung to rung, where steps compare, it was not."""
    made = MadeRun(tmp_path / "run", num_trials=40, num_blocks=2)
    [finished] = make_far(made, 0)[-1:]
    stopped = next(trial for trial in made.trials if trial.status == "stopped")
    loss, step = make_far(made, stopped.index)[-1], stopped.rungs[-1].step
    worse = "Far worse, drawn at the edge with an arrow: trial 0 (uniform-4)"
    early = "Of fewer steps, so not comparable, drawn at the edge with an arrow: trial"
    told = chart_of(made, "pareto").caption
    assert f" {worse} {finished:.4f}. {early} {stopped.index} (gp) {loss:.4f} at step {step}" in told
    assert chart_of(made, "rungs").caption.endswith(f" {worse} {finished:.4f}, {stopped.index} (gp) {loss:.4f}.")


def test_what_leaves_the_others_half_the_plot_is_shown_where_it_is() -> None:
    """Of few trials one may be far by its neighbours' measure, and yet fit."""
    losses = [2.34, 2.36, 2.345, 2.355, 2.35, 2.42]
    trials = [recorded_trial(index, "444444", [loss] * 3) for index, loss in enumerate(losses)]
    far = recorded_trial(6, "444444", [2.50] * 3)
    assert edge_of([*trials, far], "loss").score is None and edge_of_rungs([*trials, far], "loss").score is None
    further = recorded_trial(6, "444444", [2.60] * 3)
    for edge in (edge_of([*trials, further], "loss"), edge_of_rungs([*trials, further], "loss")):
        assert edge.score is not None and 2.42 < edge.score < 2.43


def test_of_a_search_by_accuracy_what_is_far_lies_below() -> None:
    found = [(0.50, 0), (0.71, 1), (0.72, 2), (0.73, 3)]
    rung = RungResult(step=8, loss=3.0, train_loss=3.0, accuracy=0.0)
    trials = [
        recorded_trial(index, "444444", [3.0] * 3, rungs=(rung.model_copy(update={"accuracy": value}),))
        for value, index in found
    ]
    for edge in (edge_of(trials, "accuracy"), edge_of_rungs(trials, "accuracy")):
        assert edge.score is not None and 0.70 < edge.score < 0.71
        assert [edge.far_score(each) for each in trials] == [0.5, None, None, None]
        assert (edge.place(0.5), edge.place(0.71)) == (edge.score, 0.71)
        assert edge.told(trials).endswith(": trial 0 (gp) 0.5000.")
    assert edge_of(trials[1:], "accuracy").score is None and edge_of(trials[1:], "accuracy").told(trials) == ""


def test_a_front_is_told_with_its_hypervolume(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=20)
    assert made.state.search
    assert "hypervolume" not in {chart.name for chart in charts(read_snapshot(made.run))}
    made.run.write_state(
        made.state.model_copy(update={"search": made.state.search.model_copy(update={"pareto": True})})
    )
    searched = made.run.read_record("search", SearchRecord)
    assert searched
    fresh = [(trial.index, trial.plan_bytes, trial.rungs[-1].loss) for trial in made.trials if trial.index in (0, 1)]
    front = tuple(
        FrontPoint(index=index, origin="gp", plan=searched.best_plan, plan_bytes=size, loss=loss, stderr=0.1)
        for index, size, loss in fresh
    )
    for volume, told in ((0.1234, "hypervolume 0.1234 nats: so much better than trial 0"), (None, "on fresh rows:\n")):
        record = searched.model_copy(update={"front": front, "hypervolume": volume})
        made.run.write_record("search", record)
        write_report(made.run)
        assert told in (made.run.root / "report.md").read_text()
        assert told.rstrip(":\n") in words(page_of(made.run.root))
        assert run_views.summary(run_views.view(made.run.root)).get("hypervolume") == volume
    values = chart_of(made, "hypervolume").spec["data"]["values"]
    finished = [trial for trial in made.trials if trial.status == "finished"]
    smallest, edge = min((trial.plan_bytes, trial.rungs[-1].loss) for trial in finished), BUDGET
    every, controls = (
        [each["hypervolume"] for each in values if each["of"] == name] for name in ("all trials", "control")
    )
    assert every == sorted(every) and controls[2:] == [controls[2]] * 18, "the first three are the controls"
    assert every[:3] == controls[:3] and every[-1] > controls[-1]
    sizes = np.linspace(smallest[0], edge, 2001)[:-1]
    best = [min(trial.rungs[-1].loss for trial in finished if trial.plan_bytes <= size) for size in sizes]
    assert len(every) == 20 and every[-1] == pytest.approx(smallest[1] - statistics.mean(best), abs=1e-3)


def test_a_given_plan_is_shown_beside_the_trials_of_the_search(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=20)
    [before] = [chart for chart in charts(read_snapshot(made.run)) if chart.name == "progress"]
    seed = made.trials[1]
    given = seed.model_copy(update={"index": 20, "origin": "given", "search": "9" * 16})
    write_trial(made.run.trials / TRIALS, given)
    searched = made.run.read_record("search", SearchRecord)
    assert searched and made.state.search
    update = {"best_index": 20, "best_origin": "given", "best_plan": given.plan, "num_trials": 1}
    made.run.write_record("search", searched.model_copy(update=update))
    state = made.state.search.model_copy(update={"search": "9" * 16, "beside": made.state.search.search})
    made.run.write_state(made.state.model_copy(update={"search": state}))
    found = {chart.name: chart.complete for chart in charts(read_snapshot(made.run))}
    points, lines = (each["data"]["values"] for each in (found["progress"], found["progress"]["layer"][0]))
    trials = [point | {"best": False} for point in before.complete["data"]["values"]]
    assert points[:-1] == trials, "the search's trials are still there"
    assert (points[-1]["trial"], points[-1]["kind"]) == (20, "given plan")
    assert {each["kind"] for each in lines} == {"searched", "control"}
    [ringed] = [point for point in found["pareto"]["data"]["values"] if point["best"]]
    assert (ringed["trial"], ringed["kind"]) == (20, "given plan")
    assert '"text": {"value": "given plan"}' in json.dumps(found["pareto"])
    write_report(made.run)
    text = words(page_of(made.run.root))
    assert "The given plan" in text and "The winner's plan" not in text and "found by" not in text


def test_the_report_for_github_has_a_picture_of_every_plot(long_run: Path) -> None:
    text = (long_run / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\((pictures/[^)]+)\)", text)
    assert len(pictures) == 8
    for picture in pictures:
        assert (long_run / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("has_map", [True, False])
def test_the_report_for_github_can_be_taken_elsewhere_with_its_pictures(has_map: bool, tmp_path: Path) -> None:
    """As `launch/fetch.sh` does; the pruned model stays where it is, or may be gone."""
    made = MadeRun(tmp_path / "run", num_trials=6, num_blocks=2)
    if has_map:
        (tmp_path / "run" / "prune").mkdir()
        (tmp_path / "run" / "prune" / "importance.png").write_bytes(b"the map")
    write_report(made.run)
    elsewhere = Path(shutil.copytree(tmp_path / "run" / "pictures", tmp_path / "elsewhere" / "pictures")).parent
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (tmp_path / "run" / "report.md").read_text())
    assert len(shown) == 8 + has_map
    assert all((elsewhere / picture).is_file() for picture in shown)
    page = (tmp_path / "run" / "report.html").read_text()
    assert (f"data:image/png;base64,{base64.b64encode(b'the map').decode()}" in page) == has_map, "the page has it, too"
    if has_map:
        assert (elsewhere / "pictures" / "importance.png").read_bytes() == b"the map"


def test_results_follow_the_published_schema(long_run: Path) -> None:
    written = (ROOT / "docs" / "results.schema.json").read_text()
    assert written == summary_schema(), "run: qpruner schema --results > docs/results.schema.json"
    results = json.loads((long_run / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    jsonschema.validate(results, json.loads(written))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(results | {"claim": 3}, json.loads(written))


def test_what_the_map_shows_when_pointed_at_is_in_a_table_too(tmp_path: Path) -> None:
    """Nobody points at a cell with a screen reader or on paper; a method's name is data and stays text."""
    root = tmp_path / "run"
    made = MadeRun(root, num_trials=120, num_blocks=2)
    measured = made.run.read_record("sensitivity", SensitivityRecord)
    assert measured
    odd = "<b>of ours</b>"
    methods = measured.methods | {odd: measured.methods["kl"]}
    made.run.write_record("sensitivity", measured.model_copy(update={"methods": methods}))
    run = read_snapshot(made.run)
    assert run.results.sensitivity and run.best_plan and run.plan
    assert run.plan.as_dict() == run.best_plan and run.plan._repr_html_().count("<span") == len(run.best_plan)
    headings, body = sections.groups(run.results.sensitivity, run.effects, run.best_plan)
    assert headings == (
        "group",
        "bits",
        "mutual_information, 4 less 8 bits",
        "first_order, 4 less 8 bits",
        "kl, 4 less 8 bits",
        f"{odd}, 4 less 8 bits",
        "trials, 4 less 8 bits",
    )
    write_report(made.run)
    plan = page_of(root)[page_of(root).index('<section id="plan"') : page_of(root).index('<section id="search"')]
    table = plan[plan.index("<summary>Every group</summary>") :]
    shown = Outline(table[: table.index("</details>")])
    assert shown.tags["tr"] == 1 + len(body) == 1 + 4 and "b" not in shown.tags and odd in shown.text
    rise = measured.methods["kl"].values
    assert f">{rise[4][3] - rise[8][3]:.3g}</td>" in table
    assert all(f'<th scope="col" class="number">{heading}</th>' in table for heading in headings[1:5])


def test_every_stage_tells_the_gpu_seconds_that_it_held(tmp_path: Path) -> None:
    """The search's are its trials'; a run on CPUs has none, nor have records of before they were counted."""
    made = MadeRun(tmp_path / "run", num_trials=4, num_blocks=2, gpus=2.0)
    column = sections.STAGE_HEADINGS.index("GPU seconds")
    held = {row[0]: row[column] for row in sections.stages(read_snapshot(made.run))}
    search = 2.0 * sum(trial.seconds for trial in made.trials) + 1.5
    confirmed = made.run.read_record("search", SearchRecord)
    assert confirmed
    made.run.write_record("search", confirmed.model_copy(update={"confirmation_gpu_seconds": 1.5}))
    held["search"] = {row[0]: row[column] for row in sections.stages(read_snapshot(made.run))}["search"]
    assert held.pop("all stages") == f"{123.0 * (len(STAGES) - 1) + search - 1.5:.1f}"
    assert held == dict.fromkeys(STAGES, "123.0") | {"search": f"{search:.1f}"}
    cells = " | 61.5 | - | 123.0 |"
    write_report(made.run)
    assert f"| bank | done{cells}" in (tmp_path / "run" / "report.md").read_text()
    without = MadeRun(tmp_path / "without", num_trials=4, num_blocks=2)
    bank = without.run.record_path("bank")
    fields = json.loads(bank.read_text())
    del fields["gpu_seconds"], fields[OWN_DIGEST]
    bank.write_text(json.dumps(fields))
    assert {row[column] for row in sections.stages(read_snapshot(without.run))} == {"-"}


def test_the_standard_error_of_one_question_is_null(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=4, num_blocks=2, questions=1)
    text = summary_text(summary_of(read_snapshot(made.run)))
    assert "NaN" not in text
    jsonschema.validate(json.loads(text), json.loads(summary_schema()))
    write_report(made.run)
    assert "nan" not in Outline(page_of(tmp_path / "run")).text.split("Configuration")[0].split()


def test_text_from_configurations_and_names_stays_text(tmp_path: Path) -> None:
    root = tmp_path / "run"
    made = MadeRun(root, num_trials=4, num_blocks=2, model=HOSTILE, task=HOSTILE, outcome="failed", error=HOSTILE)
    write_report(made.run)
    outline = Outline(page_of(root))
    assert outline.tags["img"] == 0
    assert not [target for target in outline.targets if target[1].startswith("on")]
    plain = MadeRun(tmp_path / "plain", num_trials=4, num_blocks=2)
    write_report(plain.run)
    assert outline.tags["script"] == Outline(page_of(tmp_path / "plain")).tags["script"]
    assert HOSTILE in outline.text
    prose = (root / "report.md").read_text().split("```yaml")[0]
    assert "<script" not in prose and "<img" not in prose


def test_the_page_of_the_largest_models_is_small_too(tmp_path: Path) -> None:
    """80 blocks of four groups, every sensitivity, 200 trials: 1.52 MB (measured 2026-11-26)."""
    noises = dict.fromkeys(get_args(SensitivityMethod), 0.5)
    made = MadeRun(tmp_path / "run", num_blocks=80, parts=("qkv", "o", "gate_up", "down"), noises=noises)
    run = read_snapshot(made.run)
    page = render(run, charts(run), yaml.safe_dump(run.state.config))
    assert len(made.groups) == 320 and len(noises) == 6 and len(run.trials) == 200
    assert len(page.encode()) < MAX_BYTES
    text = Outline(page).text
    assert all(sections.bar(trial.plan) in text for trial in run.trials), "the table has every plan"


def test_every_table_names_its_rows_and_columns(long_run: Path) -> None:
    main = page_of(long_run)[: page_of(long_run).index("</main>")]
    tables = re.findall("<table.*?</table>", main, re.DOTALL)
    assert len(tables) > 10
    for table in tables:
        head, body = table.split("<tbody>")
        assert "<caption>" in head
        cells = re.findall("<t[hd][^>]*>", head.replace("<thead>", ""))
        assert cells and all('<th scope="col"' in cell for cell in cells)
        first = re.findall("<tr[^>]*>(<[^>]*>)", body)
        assert first and all('<th scope="row"' in cell for cell in first)
        assert body.count("<th") == len(first)


def cells_of(root: Path, caption: str) -> list[list[str]]:
    """The text of a table's cells, by rows; the headings first."""
    page = page_of(root)
    table = page[page.index(f"<caption>{caption}</caption>") :]
    rows = re.findall("<tr[^>]*>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def drop_block(made: MadeRun, gone: int) -> None:
    """Have pruning take a block more, whole, than the model's layers are now."""
    record = made.run.read_record("prune", PruneRecord)
    assert record
    left = list(record.layers)
    nothing = {"kept_kv_groups": (), "kept_mlp_channels": (), "kept_parameters": 0}
    left.insert(gone, left[0].model_copy(update=nothing))
    numbered = tuple(layer.model_copy(update={"layer": index}) for index, layer in enumerate(left))
    dropped = tuple(layer.layer for layer in numbered if not layer.kept_parameters)
    made.run.write_record("prune", record.model_copy(update={"layers": numbered, "dropped_blocks": dropped}))


def test_where_whole_blocks_went_each_part_says_how_it_numbers_blocks(tmp_path: Path) -> None:
    """The plan's block 2 is the base's block 3 here: who looks it up in the other table must not take the wrong one."""
    root = tmp_path / "run"
    made = MadeRun(root, num_trials=6, num_blocks=3)
    drop_block(made, 1)
    told = "Blocks are numbered as in the pruned model; the base's block 1 is gone."
    assert told in chart_of(made, "winner").caption
    assert chart_of(made, "kept").caption.endswith("Blocks are numbered as in the base model.")
    write_report(made.run)
    page, text = page_of(root), (root / "report.md").read_text()
    every_group = page[page.index("<summary>Every group") : page.index(f"<caption>{sections.GROUPS_CAPTION}")]
    assert told in html.unescape(every_group) and text.count(told) == 2
    assert [row[:2] for row in cells_of(root, "Kept of each block")] == [
        ["block", "in the pruned model"], ["0", "0"], ["1", "-"], ["2", "1"], ["3", "2"],
    ]  # fmt: skip
    assert "| block | in the pruned model |" in text and "| 3 | 2 |" in text
    drop_block(made, 3)
    assert "; the base's blocks 1 and 3 are gone." in chart_of(made, "winner").caption


def test_where_no_whole_block_went_there_is_one_numbering(long_run: Path) -> None:
    assert "numbered as in" not in page_of(long_run) + (long_run / "report.md").read_text()


def test_the_page_explains_rows_and_figures_of_the_final_table_a_term_each(long_run: Path) -> None:
    run = read_snapshot(RunDir(long_run, create=False))
    text, page = words(Outline(page_of(long_run)).text), page_of(long_run)
    told = terms(run.results)
    assert len(told) > 15 and page.count("<dt>") == len(told) + page.count('<div class="tile">')
    assert all(f"{term} {meaning.replace('`', '')}" in text for term, meaning in told)


def test_the_page_tells_each_step_s_losses_beside_its_accuracy(long_run: Path) -> None:
    headings, *body = cells_of(long_run, "Step by step")
    assert headings == ["model", "scores", "answer loss", "perplexity"]
    assert [row[0] for row in body] == [
        *(f"{name} (no fine-tune)" for name in ("base", "pruned", "searched")),
        "searched, training seed 0",
        "base, training seed 0",
    ]
    assert all(float(answer_loss) > 0 and float(perplexity) > 1 for *_, answer_loss, perplexity in body)


def test_accuracies_by_task_are_in_a_table_as_in_the_plots(long_run: Path) -> None:
    headings, *body = cells_of(long_run, by_task.CAPTION)
    assert headings == ["row", "arc_easy acc (400 questions)", "piqa acc (200 questions)"]
    records = json.loads((long_run / "results.json").read_text())["records"]
    evaluated = [*records["evaluate"]["rows"][:3], *records["comparison"]["rows"]]
    run = read_snapshot(RunDir(long_run, create=False))
    plots = {chart.name: chart.spec["data"]["values"] for chart in charts(run) if chart.section == "quality"}
    untuned = [f"{name} (no fine-tune)" for name in ("base", "pruned", "searched")]
    assert [row[0] for row in body][:3] == untuned and len(body) == len(plots["task-1"]) == 10
    for label, *told in body:
        seeds = [
            row["scores"]
            for row in evaluated
            if (f"{row['name']} (no fine-tune)" if row["seed"] is None else row["name"]) == label
        ]
        for task, cell in enumerate(told):
            value = statistics.fmean(scores[task]["value"] for scores in seeds)
            (point,) = [point for point in plots[f"task-{task + 1}"] if point["row"] == label]
            assert point["value"] == pytest.approx(value)
            assert cell == f"{value:.3f} ({point['low']:.3f} to {point['high']:.3f})"
            assert f" | {cell} |" in (long_run / "report.md").read_text()


def test_figures_of_every_trial_at_every_rung_are_in_a_table(long_run: Path) -> None:
    headings, *body = cells_of(long_run, sections.RUNGS_CAPTION)
    assert headings == ["trial", "from", "loss at 4", "loss at 8", "loss at 16"]
    trials = json.loads((long_run / "results.json").read_text())["trials"]
    for trial, (number, origin, *told) in zip(trials, body, strict=True):
        losses = [f"{rung['loss']:.4f}" for rung in trial["rungs"]]
        assert (int(number), origin) == (trial["index"], trial["origin"])
        assert told == losses + ["-"] * (3 - len(losses))


def test_who_uses_a_keyboard_can_skip_to_the_answer_first(long_run: Path) -> None:
    body = page_of(long_run)[page_of(long_run).index("<body>") :]
    first, *others = re.finditer(r"<(?:a|button|input|select|summary)\b[^>]*>|<[^>]* tabindex=\"0\"[^>]*>", body)
    assert first[0] == '<a class="skip" href="#answer">'
    main = body.index("<main>")
    assert main < body.index('<section id="answer"') < min(each.start() for each in others if each.start() > main)


@pytest.mark.parametrize("until", ["prepare", "prune", "bank", "sensitivity", "search", "finetune"])
def test_a_run_that_failed_after_any_stage_has_a_page_that_says_where_and_why(tmp_path: Path, until: str) -> None:
    root = tmp_path / "run"
    stage = STAGES[STAGES.index(until) + 1]
    begun = {stage: StageState(state="running", started=0.0)}
    made = MadeRun(
        root, num_trials=6, num_blocks=2, until=until, outcome="failed", error="no space left for /runs", stages=begun
    )
    told = CliRunner().invoke(main, ["report", str(root), "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.output.splitlines()[-1])["page"] == str(root / "report.html")
    text = words(Outline(page_of(root)).text)
    assert f"Failed in stage {stage}: no space left for /runs" in text
    missing = f"There is no result yet of: {', '.join(STAGES[STAGES.index(stage) :])}."
    assert missing in text and missing in (root / "report.md").read_text()
    assert "How sure" not in text
    is_chosen = until in ("search", "finetune")
    assert ("Best so far: " in text, "The winner: " in text) == (bool(made.trials) and not is_chosen, is_chosen)
    assert ("Point at a trial" in text) == bool(made.trials)
    assert "Point at" not in (root / "report.md").read_text(), "a picture has nothing to point at"
    assert f"Failed in stage {stage}" in (root / "report.md").read_text()
    jsonschema.validate(json.loads((root / "results.json").read_text()), json.loads(summary_schema()))


def test_records_of_an_older_configuration_are_not_shown(tmp_path: Path) -> None:
    """The folder has every record, but the latest command came as far as pruning with another one."""
    root = tmp_path / "run"
    made = MadeRun(root, num_trials=4, num_blocks=2)
    stages = {name: made.state.stages[name] for name in ("prepare", "prune")}
    made.run.write_state(made.state.model_copy(update={"stages": stages, "search": None, "outcome": "interrupted"}))
    write_report(made.run)
    text = words(Outline(page_of(root)).text)
    assert "Interrupted" in text and "223.4 MB" in text
    assert "92.0 MB" not in text and "Trials" not in text


def test_a_mistake_in_the_input_leaves_the_report_there_is(tiny_raw: dict[str, Any]) -> None:
    root = Path(tiny_raw["output"])
    write_report(MadeRun(root, num_trials=4, num_blocks=2).run)
    before = page_of(root)
    too_much = with_key(tiny_raw, "search.resources_per_trial", {"cpu": 100_000})
    with pytest.raises(UserError, match="asks for"):
        run(validate_config(too_much), lambda event: None)
    assert page_of(root) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert told.exit_code == 2
    assert "holds no run" in told.output
    assert not list(tmp_path.iterdir())


def test_the_final_model_gets_a_card_that_the_hub_can_read(long_run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(long_run, tmp_path / "run"))
    (root / "final").mkdir()
    write_report(RunDir(root))
    card = ModelCard((root / "final" / "README.md").read_text())
    assert card.data.model_name == "run" and card.data.base_model is None, "a local folder is no hub id"
    scored = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    results = json.loads((root / "results.json").read_text())
    (row,) = [row for row in results["records"]["evaluate"]["rows"] if (row["name"], row["seed"]) == ("searched", 0)]
    assert scored == {score["task"]: round(score["value"], 4) for score in row["scores"]}
    assert results["claim"] in card.text and "import qpruner.hf" in card.text


def card_on(base: str, folder: Path, root: Path, converted: bool = False, **stated: Any) -> Any:
    """The metadata of the final model's card in the report of a run on `base`, whose files lie in `folder`, written by
    the run where it is converted; `stated` are keys of `card`."""
    made = MadeRun(root, num_trials=4, num_blocks=2, model=base)
    data = made.state.config["data"] | {"train": [{"source": "yahma/alpaca-cleaned"}]}
    made.run.write_state(made.state.model_copy(update={"config": made.state.config | {"data": data, "card": stated}}))
    prepared = made.run.read_record("prepare", PrepareRecord)
    assert prepared
    made.run.write_record("prepare", prepared.model_copy(update={"model_path": str(folder), "converted": converted}))
    (root / "final").mkdir()
    write_report(made.run)
    return ModelCard((root / "final" / "README.md").read_text()).data


def test_a_card_names_the_hub_model_and_data_and_its_licence(tmp_path: Path) -> None:
    """From a hub on loopback, as `prepare` fetches a model."""
    card = "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n# Base\n"
    code = (
        "from pathlib import Path\nfrom qpruner.config.schema import ModelConfig\n"
        "from qpruner.models.checkpoint import prepare_base\n"
        "for name in ('with', 'without'):\n"
        "    print(prepare_base(ModelConfig(source='me/' + name), Path('unused')).path)"
    )
    with serving() as hub:
        files = {"config.json": b"{}", "model.safetensors": save({"weight": np.zeros(1)})}
        hub.repositories["me/without"] = Repository(private=False, files=files)
        hub.repositories["me/with"] = Repository(private=False, files=files | {"README.md": card.encode()})
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr[-2000:]
    folders = [Path(line) for line in done.stdout.splitlines()[-2:]]
    told = card_on("me/with", folders[0], tmp_path / "one")
    assert (told.base_model, told.datasets) == ("me/with", ["yahma/alpaca-cleaned"])
    assert (told.license, told.license_name) == ("other", "qwen-research")
    assert told.license_link == "https://huggingface.co/me/with/blob/main/LICENSE"
    told = card_on("me/without", folders[1], tmp_path / "two")
    assert (told.base_model, told.license) == ("me/without", None)


def test_a_card_has_the_licence_of_a_base_model_that_lies_in_a_run_that_was_moved(tmp_path: Path) -> None:
    base = tmp_path / "run" / "prepare" / "model"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    assert (
        card_on("me/base", tmp_path / "gone" / "prepare" / "model", tmp_path / "run", converted=True).license == "mit"
    )


def test_a_card_that_was_copied_with_another_models_configuration_is_remarked(tmp_path: Path, tiny_model: Path) -> None:
    """By `check`, and by `run` before it begins anything; what a folder holds is its user's to say."""
    raw = raw_config(tiny_model, tmp_path / "run") | {"card": {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}}
    assert other_base_remark(validate_config(raw)) is None
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(with_key(raw, "model.source", "me/base")))
    run_until_begun = (
        "import sys\nfrom pathlib import Path\n"
        "from qpruner import events, pipeline\nfrom qpruner.config.load import load_config\n"
        "def tell(event):\n"
        "    if isinstance(event, events.StageStarted):\n        raise SystemExit\n"
        "    print(vars(event))\n"
        "pipeline.run(load_config(Path(sys.argv[1])), tell)"
    )
    with serving() as hub:
        files = {each.name: each.read_bytes() for each in tiny_model.iterdir()}
        hub.repositories["me/base"] = Repository(private=False, files=files)
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        for verb in (["-m", "qpruner", "check"], ["-c", run_until_begun]):
            command = [sys.executable, *verb, str(path)]
            done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-2000:]
            remark = "`card.base_model` is HuggingFaceTB/SmolLM2-135M-Instruct, but `model.source` is me/base"
            assert done.stdout.count(remark) == 1


def test_a_local_file_or_folder_is_no_hub_id_wherever_the_report_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are those of the folder that the command was given in."""
    made = MadeRun(tmp_path / "runs" / "one", num_trials=4, num_blocks=2, model="models/base")
    (tmp_path / "models" / "base").mkdir(parents=True)
    sources = [{"source": "data/train.jsonl"}, {"source": "yahma/alpaca-cleaned"}]
    data = made.state.config["data"] | {"train": sources}
    made.run.write_state(
        made.state.model_copy(update={"folder": str(tmp_path), "config": made.state.config | {"data": data}})
    )
    (tmp_path / "runs" / "one" / "final").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    told = CliRunner().invoke(main, ["report", "one"])
    assert told.exit_code == 0, told.output
    card = ModelCard((tmp_path / "runs" / "one" / "final" / "README.md").read_text()).data
    assert (card.base_model, card.datasets) == (None, ["yahma/alpaca-cleaned"])


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (b"---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"),
        (b"---\nlicense: [broken\n---\n", None),
        (b"---\n- license\n---\n", None),
        (b"# no metadata", None),
        (b"\xff\xfe", None),
    ],
    ids=["whole", "broken", "no-mapping", "none", "no-text"],
)
def test_a_local_model_s_licence_is_told_where_its_card_can_be_read(
    card: bytes, license: str | None, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_bytes(card)
    assert card_on(str(base), base, tmp_path / "run").license == license


def test_what_a_user_states_of_a_card_takes_the_place_of_what_is_known(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: research\n---\n# Base\n")
    told = card_on(str(base), base, tmp_path / "one", base_model="me/base", license="mit", datasets=None)
    assert (told.base_model, told.license, told.license_name) == ("me/base", "mit", None)
    assert told.datasets == ["yahma/alpaca-cleaned"]
    assert card_on(str(base), base, tmp_path / "two", datasets=["me/rows"]).datasets == ["me/rows"]


@pytest.mark.parametrize(
    ("line", "license"),
    [
        ("License-Expression: Apache-2.0", "apache-2.0"),
        ("License: MIT", "mit"),
        ("License: see the file", None),
        ("Summary: weights", None),
    ],
)
def test_a_packages_model_has_the_licence_of_its_metadata(
    line: str, license: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site" / "some_weights-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.4\nName: some-weights\nVersion: 1.0\n{line}\n")
    (installed / "top_level.txt").write_text("some_weights\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    told = card_on("package:some_weights/model.gguf", tmp_path / "none", tmp_path / "run")
    assert (told.license, told.base_model) == (license, None)


def test_a_notebook_gets_a_table_of_trials_and_the_answer(long_run: Path, tmp_path: Path) -> None:
    run = qpruner.read_run(long_run)
    frame = run.to_dataframe()
    assert len(frame) == 200 and set(frame["bits of layers.00.mlp"]) <= {4, 8}
    assert frame["loss at 16"].notna().sum() == (frame["status"] == "finished").sum()
    shown = Outline(f"<div>{run._repr_html_()}</div>")
    assert "92.0 MB" in shown.text and "no difference shown" in shown.text
    hostile = PrecisionPlan(('"><script>',), (8,))
    assert Outline(hostile._repr_html_()).tags == {"span": 1}
