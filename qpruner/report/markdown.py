"""`report.md`: what came out, for people on GitHub."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qpruner.report import by_task, legend, sections
from qpruner.report.claim import claim
from qpruner.report.importance_map import PICTURE
from qpruner.report.plots.chart import Chart
from qpruner.report.search_summary import search_text
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import Results, SensitivityRecord


def render(run: Snapshot, charts: Sequence[Chart], pictures: str, config: str, has_map: bool) -> str:
    """The whole report; of an unfinished run what there is.

    Args:
        run: What the run's folder tells.
        charts: Its plots.
        pictures: Folder with a PNG file of each plot, seen from the report.
        config: The configuration as YAML.
        has_map: Whether the importance map is among the pictures.
    """
    # Longer than any run of backticks in the configuration.
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", config))])
    lines = [f"# qpruner: {prose(run.name)}", ""]
    if run.state.resumed or run.missing:
        lines += [prose(run.standing), ""]
    lines += [run.missing, ""] if run.missing else []
    if run.is_whole:
        lines += [*_final_table(run), *_shown(charts, "quality", pictures)]
    lines += _search(run, charts, pictures)
    if run.sensitivity:
        lines += _sensitivities(run.sensitivity, run)
    lines += _shown(charts, "plan", pictures)
    if run.results.prune:
        lines += [
            "## Pruning",
            "",
            prose(sections.prune_summary(run.results.prune)),
            "",
            *_shown(charts, "pruning", pictures),
            *(_picture(*sections.IMPORTANCE, f"{pictures}/{PICTURE}") if has_map else ()),
            pipe_table(*sections.layers(run.results.prune)),
            "",
        ]
    lines += [
        "## Cost",
        "",
        pipe_table(sections.STAGE_HEADINGS, sections.stages(run)),
        "",
        sections.STAGE_LEGEND,
        "",
        *_shown(charts, "cost", pictures),
        "## To repeat it",
        "",
        f"- command: {code(run.state.command)}",
        *[f"- {prose(name)}: {prose(value)}" for name, value in sections.environment(run)],
        "",
        f"{fence}yaml",
        config.rstrip(),
        fence,
        "",
    ]
    if plan := sections.given_plan(run):
        lines += ["The plan that was taken instead of a search:", "", "```yaml", plan.rstrip(), "```", ""]
    return "\n".join(lines)


def _final_table(run: Snapshot) -> list[str]:
    assert run.results.evaluate
    return [
        *measured(run.results, [prose(run.to_compare), ""] if run.to_compare else []),
        "## Step by step",
        "",
        sections.STEPS_TEXT,
        "",
        pipe_table(*sections.steps(run.results)),
        "",
        f"{by_task.CAPTION}:",
        "",
        pipe_table(*by_task.table(run.results)),
        "",
    ]


def _search(run: Snapshot, charts: Sequence[Chart], pictures: str) -> list[str]:
    search = run.results.search
    if search is None and run.state.search is None:
        return []
    lines = ["## The search", ""]
    for line in search_text(search, run.trials) if search else sections.unfinished_search_text(run):
        lines += [prose(line), ""]
    if search:
        lines += [f"{sections.FINALISTS_CAPTION}:", "", pipe_table(*sections.finalists(search)), ""]
        if search.front:
            lines += [f"{sections.front_caption(search)}:", "", pipe_table(*sections.front(search)), ""]
    return [*lines, *_shown(charts, "search", pictures)]


def _sensitivities(measured: SensitivityRecord, run: Snapshot) -> list[str]:
    """Every method beside what trials show, and the best plan's bits."""
    return [
        "## Sensitivities and winner",
        "",
        f"{prose(sections.methods_caption(measured))}.",
        "",
        pipe_table(*sections.methods(measured, run.effects)),
        "",
        prose(sections.effects_text(run.effects)),
        "",
        f"{sections.GROUPS_CAPTION}. {sections.group_numbering(run.results.prune)}".rstrip(),
        "",
        pipe_table(*sections.groups(measured, run.effects, run.best_plan)),
        "",
    ]


def _shown(charts: Sequence[Chart], section: str, pictures: str) -> list[str]:
    lines = []
    for chart in charts:
        if chart.section == section:
            lines += _picture(chart.title, chart.caption, f"{pictures}/{chart.name}.png")
    return lines


def _picture(title: str, caption: str, path: str) -> list[str]:
    return [f"![{prose(title)}]({path})", "", f"{prose(title)}. {prose(caption)}", ""]


def measured(results: Results, remark: Sequence[str] = ()) -> list[str]:
    """The claim, maybe a remark, the final table in its parts, and how to read it."""
    explained = [f"- **{term}**: {prose(meaning)}" for term, meaning in legend.terms(results)]
    return [*claimed(results), "", *remark, *final_tables(results), f"{legend.TITLE}:", "", *explained, ""]


def final_tables(results: Results) -> list[str]:
    """The final table in parts that fit a page's width, each under its caption."""
    lines = []
    for caption, headings, body in sections.final_tables(results):
        lines += [f"{caption}:", "", pipe_table(headings, body), ""]
    return lines


def claimed(results: Results) -> list[str]:
    """The claim: a paragraph, and a list of what it rests on, which no empty line sets off."""
    lead, *items = claim(results).splitlines()
    return [prose(lead), *(f"- {prose(item.removeprefix('- '))}" for item in items)]


def pipe_table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; no text in a cell can end it."""
    first, *others = ("| " + " | ".join(map(_cell, row)) + " |" for row in (headings, *body))
    return "\n".join([first, "|" + "---|" * len(headings), *others])


def prose(text: str) -> str:
    """A paragraph in which nothing is markup but words between two backticks, which are code."""
    # What makes a list, a heading, a rule or a quotation of a paragraph stands where it begins.
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[-+](?:\s|$)|--|#|>))", r"\1\\", _inline(text).strip())


def code(text: str) -> str:
    """Text as code; a backtick would end it."""
    plain = text.replace("`", "'")
    return f"`{plain}`"


def _inline(text: str) -> str:
    parts = re.split(r"(?<!`)(`[^`\n]+`)(?!`)", text)
    escaped = (part if index % 2 else _escaped(part) for index, part in enumerate(parts))
    return "".join(escaped).replace("\n", " ")


def _escaped(text: str) -> str:
    """Without an underscore inside a word, which is none of Markdown's."""
    marked = re.sub(r"[\\`*~\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return marked.replace("&", "&amp;").replace("<", "&lt;")


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|")
