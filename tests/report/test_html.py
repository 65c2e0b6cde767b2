"""The page: self-contained, small, escaped, and written for unfinished runs, too."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bs4 import BeautifulSoup
from conftest import command, with_key
from made_run import (
    BUDGET,
    HOSTILE,
    STAGES,
    STARTED,
    MadeRun,
    results_of,
    score,
    searched_row,
    snapshot,
)

import qpruner
from qpruner.plans.plan import PrecisionPlan
from qpruner.report import tables
from qpruner.report.claim import claim
from qpruner.report.files import summary_schema, summary_text, write_report
from qpruner.report.html import render
from qpruner.report.plots.chart import Chart
from qpruner.report.sections import sections
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.records import StageState

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 2_000_000
TARGETS = ("src", "href", "action", "srcset", "data", "poster", "aria-labelledby")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = MadeRun(tmp_path_factory.mktemp("long") / "run")
    write_report(made.run)
    return made.run.root


@pytest.fixture(scope="module")
def long_page(long_run: Path) -> BeautifulSoup:
    return page_of(long_run)


def page_of(root: Path) -> BeautifulSoup:
    return BeautifulSoup((root / "report.html").read_text(encoding="utf-8"), "html.parser")


def page_now(made: MadeRun) -> BeautifulSoup:
    """Return the page without writing the pictures, which take most of the time."""
    run = read_snapshot(made.run)
    return BeautifulSoup(render(run, sections(run)), "html.parser")


def words(page: BeautifulSoup) -> str:
    """Return the text outside scripts and styles, with single spaces."""
    return re.sub(r"\s+", " ", page.get_text())


def attributes_of(page: BeautifulSoup) -> list[tuple[str, str]]:
    return [item for tag in page(True) for item in tag.attrs.items()]


def test_the_page_of_200_trials_is_small_and_loads_nothing(
    long_run: Path, long_page: BeautifulSoup
) -> None:
    assert (long_run / "report.html").stat().st_size < MAX_BYTES
    ids = Counter(value for name, value in attributes_of(long_page) if name == "id")
    assert max(ids.values()) == 1
    for name, value in attributes_of(long_page):
        assert not name.startswith("on")
        if name in TARGETS:
            assert name == "aria-labelledby" or value.startswith("#"), f"it loads {name}={value}"
            assert value.removeprefix("#") in ids, f"{name}={value} leads nowhere"
    style = long_page.style.get_text()
    assert not long_page("link")
    assert "url(" not in style
    assert "@import" not in style
    assert long_page.find("meta", content=re.compile("default-src 'none'"))


def test_the_page_answers_first_and_has_every_part(
    long_run: Path, long_page: BeautifulSoup
) -> None:
    text = words(long_page)
    first, *others = long_page.main("section", recursive=False)
    assert first["id"] == "answer"
    assert first.details is None, "the answer and the picture are not folded away"
    assert all(
        each.details and each.details.h2 and not each.details.has_attr("open") for each in others
    )
    assert first.figure["data-plot"] == "pareto"
    assert f"Budget {BUDGET / 1e6:.1f} MB, any adapter included." in text
    assert len(first("table")) == 1
    assert len(first("tr")) <= 9
    assert len(first.tr("th")) <= 6
    bars = first("svg")
    assert len(bars) == 5
    assert all("95 % interval" in bar["aria-label"] for bar in bars)
    claim = json.loads((long_run / "results.json").read_text())["claim"].splitlines()[0]
    for each in (
        claim,
        "qpruner run my.yaml --set search.max_trials=200",
        "2.13.0",
        "AMD EPYC 9555",
        "rank: 4",
    ):
        assert each in text
    assert {each["data-plot"] for each in long_page("figure")} == {"plans", "pareto", "kept"}
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (long_run / "report.md").read_text())
    assert len(shown) == 3
    assert all((long_run / picture).read_bytes().startswith(b"\x89PNG") for picture in shown)


def test_every_table_names_its_rows_and_columns(long_page: BeautifulSoup) -> None:
    found = long_page.main("table")
    assert len(found) > 10
    assert len(long_page.main("tr")) > 200
    for table in found:
        assert table.caption
        assert all(
            cell.name == "th" and cell["scope"] == "col" for cell in table.thead(["th", "td"])
        )
        for row in table.tbody("tr"):
            first, *others = row(["th", "td"])
            assert first.name == "th"
            assert first["scope"] == "row"
            assert all(cell.name == "td" for cell in others)
    classes = {
        heading.get_text(): heading.get("class") for table in found for heading in table.thead("th")
    }
    assert classes["test acc"] == ["number"]
    assert classes["from"] is None


@pytest.mark.parametrize(("until", "mark"), [("search", "winner"), ("sensitivity", "best so far")])
def test_the_table_of_trials_marks_the_best_in_words(until: str, mark: str, tmp_path: Path) -> None:
    begun = {} if until == "search" else {"search": StageState(state="running", started=0.0)}
    made = MadeRun(tmp_path / "run", num_trials=9, num_blocks=2, until=until, stages=begun)
    run = read_snapshot(made.run)
    table = tables.trials(run)
    assert run.best_trial
    assert [row[0] for row in table.rows if row[2].endswith(f", {mark}")] == [
        f"{run.best_trial.index}"
    ]
    assert table.headings[-2:] == ("plan", "reason")
    assert table.rows[7][-1] == "TrainingDiverged: loss is nan"
    for trial in made.trials:
        made.write(trial, reason=None)
    assert tables.trials(read_snapshot(made.run)).headings[-1] == "plan", "no column of dashes"


def test_a_cut_that_computes_too_much_is_never_the_best(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", num_trials=9, num_blocks=2, until="sensitivity")
    best = read_snapshot(made.run).best_trial
    assert best
    made.write(best, cut="base")
    made.change_search(may_win=("cut-20",))
    run = read_snapshot(made.run)
    assert run.best_trial
    assert run.best_trial.index != best.index


def test_text_from_configurations_and_names_stays_text(tmp_path: Path) -> None:
    root = tmp_path / "run"
    made = MadeRun(
        root,
        num_trials=4,
        num_blocks=2,
        model=HOSTILE,
        task=HOSTILE,
        outcome="failed",
        error=HOSTILE,
    )
    measured = made.record("sensitivity").methods
    made.change("sensitivity", methods=measured | {"<b>of ours</b>": measured["kl"]})
    write_report(made.run)
    page = page_of(root)
    assert HOSTILE in page.get_text()
    assert not page(["img", "b"])
    assert not any(name.startswith("on") for name, _ in attributes_of(page))
    assert len(page("script")) == len(page_now(MadeRun(tmp_path / "plain", 4, 2))("script"))
    prose = (root / "report.md").read_text().split("```yaml")[0]
    assert "<script" not in prose
    assert "<img" not in prose


@pytest.mark.parametrize("until", ["sensitivity", "finetune"])
def test_a_failed_run_has_a_page_that_says_where_and_why(tmp_path: Path, until: str) -> None:
    root = tmp_path / "run"
    left = STAGES[STAGES.index(until) + 1 :]
    begun = {left[0]: StageState(state="running", started=0.0)}
    MadeRun(
        root, 6, 2, until=until, outcome="failed", error="no space left for /runs", stages=begun
    )
    done = command("report", root, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1])["page"] == str(root / "report.html")
    text = words(page_of(root))
    markdown = (root / "report.md").read_text()
    missing = f"There is no result yet from: {', '.join(left)}."
    for said in (f"Failed in stage {left[0]}: no space left for /runs", missing):
        assert said in text
        assert said in markdown
    assert ("best so far were chosen by the rows" in text) == (until == "sensitivity")
    assert ("The winner, every control" in text) == (until == "finetune")
    jsonschema.validate(
        json.loads((root / "results.json").read_text()), json.loads(summary_schema())
    )


def test_records_of_an_older_configuration_are_not_shown(tmp_path: Path) -> None:
    """The folder has all records, but the latest command, with another configuration, only reached
    pruning."""
    made = MadeRun(tmp_path / "run", num_trials=4, num_blocks=2)
    stages = {name: made.state.stages[name] for name in ("prepare", "prune")}
    made.change_state(stages=stages, search=None, outcome="interrupted")
    text = words(page_now(made))
    assert "Interrupted" in text
    assert "223.4 MB" in text
    assert "92.0 MB" not in text
    assert "The search" not in text


def test_results_follow_the_published_schema(long_run: Path) -> None:
    written = (ROOT / "docs" / "results.schema.json").read_text()
    assert written == summary_schema(), "run: qpruner schema --results > docs/results.schema.json"
    results = json.loads(
        (long_run / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    jsonschema.validate(results, json.loads(written))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(results | {"claim": 3}, json.loads(written))
    text = summary_text(snapshot(results_of(searched_row([1.0], [score([1.0])]))))
    assert "NaN" not in text, "the standard error of one question"
    jsonschema.validate(json.loads(text), json.loads(written))


def test_every_stage_has_the_gpu_seconds_that_it_held(tmp_path: Path) -> None:
    """The search's GPU seconds are those of its trials and of the confirmation; a run on CPUs has
    none."""

    def held(made: MadeRun) -> dict[str, str]:
        return {row[0]: row[-1] for row in tables.stages(read_snapshot(made.run)).rows}

    made = MadeRun(tmp_path / "run", num_trials=4, num_blocks=2, gpus=2.0)
    made.hold_for_finalists(1.5)
    search = 2.0 * sum(trial.seconds for trial in made.trials) + 1.5
    found = held(made)
    assert found.pop("all stages") == f"{123.0 * (len(STAGES) - 1) + search:.1f}"
    assert found == dict.fromkeys(STAGES, "123.0") | {"search": f"{search:.1f}"}
    assert set(held(MadeRun(tmp_path / "without", num_trials=4, num_blocks=2)).values()) == {"-"}


def test_blocks_are_numbered_as_in_the_base_model(tmp_path: Path) -> None:
    """If block 1 was removed, the plan's block 2 is the base's block 3."""
    made = MadeRun(tmp_path / "run", num_trials=6, num_blocks=3)
    cuts = made.record("prune").cuts
    layers = list(cuts["cut-20"].layers)
    layers.insert(1, layers[0].model_copy(update={"kept_kv_groups": (), "kept_mlp_channels": ()}))
    numbered = tuple(
        layer.model_copy(update={"layer": index}) for index, layer in enumerate(layers)
    )
    changed = cuts["cut-20"].model_copy(update={"layers": numbered, "dropped_blocks": (1,)})
    made.change("prune", cuts={**cuts, "cut-20": changed})
    [chart] = [
        part
        for each in sections(read_snapshot(made.run))
        if each.name == "plans"
        for part in each.parts
    ]
    assert isinstance(chart, Chart)
    for panel in chart.spec["vconcat"]:
        groups = {value["group"] for value in panel["data"]["values"]}
        assert groups == {
            f"layers.{block}.{part}" for block in (0, 2, 3) for part in ("attention", "mlp")
        }


def test_python_has_a_table_of_trials_and_the_plan(long_run: Path) -> None:
    found = qpruner.read_run(long_run)
    frame = found.to_dataframe()
    assert len(frame) == len(found.trials)
    assert frame["bytes"][1] == found.trials[1].plan_bytes
    assert repr(found).startswith(
        "<Snapshot of the run 'run': 200 trials; prepare, prune, bank, sensitivity, search"
    )
    assert found.plan.as_dict() == found.best_plan
    assert found.plan._repr_html_().endswith("</span> 20 % pruned")
    hostile = PrecisionPlan(('"><script>',), ("int8",))
    assert [tag.name for tag in BeautifulSoup(hostile._repr_html_(), "html.parser")(True)] == [
        "span"
    ]


# ---- a winner that was compared with nothing

COMMAND = "qpruner run my.yaml --set search.max_trials=200 --set finetune.compare=true"


def status(root: Path) -> tuple[dict[str, Any], str]:
    """Return the output of `qpruner status`, as data and as text."""
    outputs = [command("status", root, *form).output for form in (("--json",), ())]
    return json.loads(outputs[0]), outputs[1]


def test_a_winner_alone_is_shown_with_the_way_to_compare(tmp_path: Path) -> None:
    root = tmp_path / "run"
    report = {"report": StageState(state="done", started=STARTED, seconds=1.0)}
    made = MadeRun(root, num_trials=40, num_blocks=2, until="evaluate", stages=report)
    (root / "final").mkdir()
    flow = tuple(name for name in made.state.flow if name != "comparison")
    config = with_key(made.state.config, "finetune.compare", False)
    made.change_state(config=config, flow=flow, asked=flow)
    write_report(made.run)
    alone = read_snapshot(made.run)
    results = alone.results
    assert results.finetune
    assert results.evaluate
    assert results.search
    scored = results.evaluate.rows
    base, _, _, winner = (row.accuracy for row in scored)
    lead, nothing, as_trial = claim(results).splitlines()
    alternative = "the best simple alternative, both as trials on the rows that chose the winner"
    assert lead == f"3.0 times smaller than the base; not distinguishable from {alternative}."
    assert f"{alternative.partition(', both ')[2]}: selection loss " in as_trial
    shown = re.sub(r"\s+", " ", page_of(root).find(id="answer").get_text(" "))
    for figures in (
        "base no fine-tune",
        "as a trial",
        f"test acc {winner:.3f} {base:.3f}",
        "selection loss",
    ):
        assert figures in shown
    assert "nothing is claimed at equal bytes" in nothing
    facts, text = status(root)
    markdown = (root / "report.md").read_text()
    assert f"`{COMMAND}`" in facts["to_compare"]
    assert COMMAND in text
    assert f"`{COMMAND}`" in markdown
    assert COMMAND in [code.get_text() for code in page_of(root)("code")]
    assert "finetune.compare" not in (root / "final" / "README.md").read_text(), (
        "its readers have no such run"
    )
    assert alone.standing == "Finished."
    assert alone.missing is None
    assert [each["stage"] for each in facts["stages"]][-3:] == ["finetune", "evaluate", "report"]


def test_without_its_comparison_the_winner_is_complete(tmp_path: Path) -> None:
    root = tmp_path / "run"
    begun = {"comparison": StageState(state="running", started=STARTED)}
    made = MadeRun(root, 6, 2, until="evaluate", stages=begun, outcome="interrupted")
    (root / "final").mkdir()
    write_report(made.run)
    run = read_snapshot(made.run)
    summary = json.loads((root / "results.json").read_text())
    assert run.standing == "Interrupted in stage comparison; repeat the command to resume."
    assert run.missing == "There is no result yet from: comparison."
    assert [row["name"] for row in summary["table"]] == ["searched"]
    assert summary["claim"] == claim(run.results)
    assert run.standing in (root / "report.md").read_text()
    assert "Measured" in (root / "final" / "README.md").read_text()
    facts, text = status(root)
    assert facts["to_compare"] is None
    assert "finetune.compare" not in text, "it is asked for"
    last = [(each["stage"], each["state"]) for each in facts["stages"]][-2:]
    assert last == [("comparison", "interrupted"), ("report", "waiting")]

    compared = read_snapshot(MadeRun(tmp_path / "compared", num_trials=6, num_blocks=2).run)
    found = compared.results
    assert found.comparison
    assert found.evaluate
    assert found.fine_tunes == found.comparison.rows
    assert found.inference == found.comparison.inference, (
        "memory and speed as measured beside the others"
    )
    assert compared.how_to_compare is None
    assert compared.standing == "Finished."
