"""The tables show the figures that were measured."""

import math

import numpy as np
import pytest
from bs4 import BeautifulSoup, Tag
from made_run import (
    ORIGINS,
    PLAN,
    RIVAL,
    answers,
    candidate,
    results_of,
    row_of,
    score,
    searched_row,
    snapshot,
    whole_results,
    with_figures,
)
from markdown_it import MarkdownIt

from qpruner.report import tables
from qpruner.report.card import model_card
from qpruner.report.claim import claim
from qpruner.report.content import pipe_table, prose, report_md
from qpruner.report.results import rows
from qpruner.report.sections import sections
from qpruner.runs.records import RANDOM, SEARCHED, Results, TaskScore


@pytest.fixture
def whole() -> Results:
    return whole_results()


def report(results: Results) -> str:
    """Return the Markdown report."""
    run = snapshot(results)
    return report_md(run, sections(run), "pictures")


def test_a_row_is_the_mean_of_its_tasks_and_of_its_seeds(whole: Results) -> None:
    table = {row.name: row for row in rows(whole)}
    assert [row.seeds for row in table.values()] == [(0,)] * 4 + [(0, 1)] * 3
    assert [" ".join(row.plans) for row in table.values()] == [
        "FF",
        "FF",
        "44",
        "88",
        "48",
        "48 84",
        "84",
    ]
    first, random = table["base"], table[RANDOM]
    assert first.accuracy == pytest.approx((10 / 50 + 30 / 40) / 2)
    assert first.accuracy_stderr == pytest.approx(
        math.sqrt(sum([0.2 * 0.8 / 49, 0.75 * 0.25 / 39])) / 2
    )
    assert (
        first.accuracy_spread is first.confirmation_loss_spread is first.answer_loss_spread is None
    )
    assert random.accuracy == pytest.approx(((15 + 20) / 2 / 50 + 30 / 40) / 2)
    assert random.accuracy_spread == pytest.approx(0.05 / math.sqrt(2))
    assert (random.confirmation_loss, random.confirmation_loss_spread) == pytest.approx(
        (2.5, 1 / math.sqrt(2))
    )
    assert (random.answer_loss, random.answer_loss_spread) == pytest.approx(
        (1.75, 0.5 / math.sqrt(2))
    )
    assert random.measured_bytes == 100_550_000
    assert {name: row.origin for name, row in table.items() if name in ORIGINS} == ORIGINS


def test_a_rows_standard_error_is_that_of_its_mean() -> None:
    """It is the error of the mean over seeds: chance in one seed's answer counts less than chance
    in all seeds'."""
    by_seed = [answers(4, 2), answers(4, 3), answers(4, 3)]
    results = results_of(
        [*row_of(RIVAL, [2.0]), *searched_row([1.0] * 3, [score(each) for each in by_seed])]
    )
    (row,) = [row for row in rows(results) if row.name == SEARCHED]
    assert row.accuracy == pytest.approx(np.mean(by_seed))
    expected = np.mean(by_seed, axis=0).std(ddof=1) / 2
    assert row.accuracy_stderr == pytest.approx(expected)
    assert tables.by_task(results).rows[-1][1] == f"{row.accuracy:.3f} (se {expected:.3f})"


@pytest.mark.parametrize(
    ("metrics", "name", "in_full"),
    [
        (("acc_norm", "acc_norm"), "acc_norm", "acc_norm"),
        (("acc_norm", "acc"), "accuracy", "accuracy (acc_norm of arc; acc of boolq)"),
    ],
)
def test_every_accuracy_is_shown_with_the_metric_it_is(
    metrics: tuple[str, str], name: str, in_full: str
) -> None:
    """acc and acc_norm of one model may differ as much as two models do (HellaSwag 53 and 69)."""
    asked = list(zip(("arc", "boolq"), metrics, strict=True))
    scores = tuple(score(answers(50, 20), [1.0] * 50, task, metric) for task, metric in asked)
    tuned = [
        *row_of("base", [1.0]),
        *row_of("pruned", [1.0]),
        *row_of(RIVAL, [2.0]),
        *searched_row([1.0]),
    ]
    results = results_of([row.model_copy(update={"tasks": scores}) for row in tuned])
    first = tables.final_tables(results)[0]
    assert f"test {name}" in first.headings and first.caption.endswith(f"; {in_full}") == (
        name == "accuracy"
    )
    assert f": {name} +0.0000 (100 questions, " in claim(results)
    assert f"| test {name} | 0.400 | 0.400 ({name} +0.0000 (" in report(results)
    assert tables.by_task(results).headings[1:3] == tuple(
        f"{task} {metric} (50 questions)" for task, metric in asked
    )
    card = model_card(snapshot(results))
    assert all(f"name: {metric}\n" in card for metric in metrics), "in what the hub reads"
    assert f"| test {name} |" in card


def test_the_report_has_every_row_claim_and_configuration(whole: Results) -> None:
    text = report(whole)
    lines = text.splitlines()
    for each in (*tables.final_tables(whole), tables.legend(whole), tables.by_task(whole)):
        assert f"{each.caption}:" in lines
        for cells in (each.headings, *each.rows):
            assert f"| {' | '.join(cells)} |".replace("*", "\\*") in lines
    assert " | gp, trial 11 | 2 (0-1) | 2.5000 ± 0.7071 |" in text
    assert "\n\n".join(claim(whole).split("\n", 1)) in text
    assert claim(whole).splitlines()[0] in model_card(snapshot(whole))
    assert "```yaml\nmodel:\n  source: me/base\n" in text and "| python | 3.11.9 |" in lines


def test_each_model_stands_with_its_tasks_and_losses(whole: Results) -> None:
    """By the accuracy on 48 questions alone, a pruned model may look better than its base."""

    def of_losses(accuracy: int, *losses: float) -> tuple[TaskScore, ...]:
        tasks = zip(("arc", "piqa"), losses, strict=False)
        return tuple(
            score(answers(48, accuracy), [loss] * 48 if loss else [], task) for task, loss in tasks
        )

    untuned = [("base", of_losses(30, 11.0, 12.0)), ("pruned", of_losses(31, 12.0, 13.0))]
    results = results_of([candidate(SEARCHED, PLAN, tasks=of_losses(33, 8.0, 9.0))], untuned)
    found, with_text = tables.by_task(results), tables.by_task(with_figures(results))
    assert found.headings[3:] == ("answer loss",), "no text, no perplexity"
    losses = {
        "base (no fine-tune)": "11.5000",
        "pruned (no fine-tune)": "12.5000",
        "searched": "8.5000",
    }
    assert {row[0]: row[3] for row in found.rows} == losses
    assert (
        with_text.headings[4] == "perplexity" and [row[4] for row in with_text.rows] == ["8.00"] * 3
    )
    wordless = results_of([candidate(SEARCHED, PLAN, tasks=of_losses(33, 0.0, 1.0))])
    assert len(tables.by_task(wordless).headings) == 3, "of some tasks alone it is no mean over all"
    one = results_of([candidate(SEARCHED, PLAN, tasks=[score([1.0])])])
    assert tables.by_task(one).rows[0][1] == "1.000", "one question has no standard error"
    [random] = [row for row in tables.by_task(whole).rows if row[0] == RANDOM]
    assert random[1:] == ("0.350 (se 0.064)", "0.750 (se 0.069)", "1.7500"), (
        "a mean over fine-tunes"
    )


def test_a_row_shows_its_models_memory_and_speed(whole: Results) -> None:
    """Figures are over all turns of all the row's models, since each training seed may have its own
    plan."""
    table = {row.name: row for row in rows(with_figures(whole))}
    assert table["base"].prefill_tokens_per_second == (110.0, 100.0, 150.0)
    assert table["base"].decode_tokens_per_second == (12.0, 10.0, 20.0)
    assert table[RANDOM].prefill_tokens_per_second == (110.5, 100.0, 151.0)
    assert table[RANDOM].inference_memory_bytes == 310_000_000
    assert (
        table["base"].perplexity == pytest.approx(8.0) and table["base"].perplexity_spread is None
    )
    assert (table[RANDOM].perplexity, table[RANDOM].perplexity_spread) == pytest.approx(
        (9.0, math.sqrt(2))
    )
    shown = tables.cells(table["base"])
    assert list(shown.values())[-3:] == ["300 MB", "110 (100-150)", "12.0 (10.0-20.0)"]
    assert shown["perplexity"] == "8.00"
    assert (
        "on NVIDIA X"
        in dict(tables.legend(with_figures(whole)).rows)["inference memory and tokens/s"]
    )
    without = tables.cells(rows(whole)[0])
    assert list(without.values())[-3:] == ["-", "-", "-"] and without["perplexity"] == "-"


def test_the_report_tells_of_search_pruning_and_sensitivities(whole: Results) -> None:
    text = report(whole)
    assert "16 trials, 7 finished, 8 stopped early, 1 failed" in text
    assert "It ended because all 16 trials were spent (`search.max_trials`)." in text
    assert "reused 5 trials of earlier searches" in text
    assert (
        "It ran in 2 sessions; the last began with 3 trials already recorded. "
        "Failed: 1 diverged (lower"
    ) in text
    assert "\n| row | trial | cut | formats | bytes | selection loss |\n" in text
    assert (
        "\n| not pruned, knapsack, reused | 2 | 20 % pruned | 1 nf4, 1 int8 | 100.0 MB "
        "| 2.1250 (selection"
    ) in text
    assert (
        "Cuts (importance taylor, selection global, compensation none); multiply-adds are" in text
    )
    assert "\n| 20 % pruned | 19.84% | 120.2 M | 240.5 MB | 100.0% | 2.5000 | 1.5 |\n" in text


# ---- Markdown, as a renderer reads it

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def plain(element: Tag) -> str:
    """Return the text that a reader sees; fail if it has any element except code."""
    assert {tag.name for tag in element(True)} <= {"code"}
    return "".join(
        f"`{part.get_text()}`" if isinstance(part, Tag) else part for part in element.children
    )


def shown(markup: str) -> str:
    page = BeautifulSoup(MARKDOWN.render(markup), "html.parser")
    assert [tag.name for tag in page(True, recursive=False)] == ["p"]
    return plain(page.p)


@pytest.mark.parametrize(
    "text",
    [
        "my_model_name* and *another*",
        "_x_, __init__ and a_b_",
        "`search.max_trials`, `**/*.py_` and a ` alone",
        "`` two ` of `` them",
        "[a](b) ![c](d) <b>e</b> &lt; a\\*b\\",
        "~~gone~~",
        *("- a", "+ a", "* a", "1. a", "2) a", "# a", "> a", "---", "***", "```", "-"),
    ],
)
def test_what_a_configuration_names_is_text_and_no_markup(text: str) -> None:
    assert shown(prose(text)) == text


def test_lines_are_one_paragraph_and_words_in_backticks_code() -> None:
    assert (
        shown(prose("it failed:\n# why\n- so\n\n    and so")) == "it failed: # why - so      and so"
    )
    assert (
        MARKDOWN.render(prose("set `finetune.compare`"))
        == "<p>set <code>finetune.compare</code></p>\n"
    )


def test_no_text_in_a_table_ends_its_cell_or_is_markup() -> None:
    texts = ("a|b", "*c*\nd", "`e|f`", "<i>g</i>", "-", "0.5")
    page = BeautifulSoup(MARKDOWN.render(pipe_table(texts, [texts])), "html.parser")
    for tag in ("th", "td"):
        assert [plain(cell) for cell in page(tag)] == [text.replace("\n", " ") for text in texts]
    assert "| - | 0.5 |" in pipe_table(texts, [texts]), "nothing is escaped without need"
