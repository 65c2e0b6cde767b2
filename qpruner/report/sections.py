"""Lists the sections of a run's report, each a heading and what stands under it: what both renderings show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import yaml

from qpruner.report import legend, tables
from qpruner.report.answer import tiles
from qpruner.report.claim import claim
from qpruner.report.content import (
    Code,
    Items,
    Paragraph,
    Part,
    PlanBar,
    Section,
    Table,
    Terms,
    Tiles,
    TrialsTable,
)
from qpruner.report.plots.chart import Chart
from qpruner.report.search_progress import score
from qpruner.report.search_summary import search_text
from qpruner.report.snapshot import Snapshot
from qpruner.report.statistics import MarginalEffects
from qpruner.runs.records import GIVEN, PruneRecord, Results
from qpruner.wording import counted

STEPS_NOTE = (
    "The model as each step leaves it: base, pruned, quantized by the winner's plan (with the adapter start that its "
    "fine-tune begins with), fine-tuned; last, where it is a row, the base after the same fine-tune, with which the "
    "winner is to be compared. The answer loss is finer than the accuracy."
)
STAGES_NOTE = (
    "Seconds are what the stage took; busy seconds add up its parallel jobs; GPU seconds are those of its jobs times "
    "the GPUs that were held for them, busy or not: of stages before the search in the command that recorded them, of "
    "the others in all commands whose results stand."
)


def sections(run: Snapshot, charts: Sequence[Chart], config: str) -> list[Section]:
    """List the sections that the run has something to show in.

    Args:
        run: What the run's folder holds.
        charts: Its plots.
        config: The configuration as YAML.
    """

    def plots(section: str) -> list[Chart]:
        return [chart for chart in charts if chart.section == section]

    plan = "The given plan" if run.is_given else "The winner's plan" if run.results.search else "The best plan so far"
    listed = [
        Section("answer", "The answer", "The answer", list(_answer(run))),
        Section("quality", "Quality by task", "Quality", list(_quality(run, plots("quality")))),
        Section("plan", plan, "Plan", list(_plan(run, plots("plan")))),
        Section("search", "The search", "Search", list(_search(run, plots("search")))),
        Section("pruning", "Pruning", "Pruning", list(_pruning(run.results.prune, plots("pruning")))),
        Section("cost", "Cost", "Cost", [tables.stages(run), Paragraph(STAGES_NOTE, is_note=True), *plots("cost")]),
        Section("repeat", "To repeat it", "To repeat it", list(_repeat(run, config))),
    ]
    return [section for section in listed if section.parts]


def _answer(run: Snapshot) -> Iterator[Part]:
    yield Tiles(tuple(tiles(run)))
    if run.is_whole:
        yield from measured(run.results, run.how_to_compare)


def measured(results: Results, remark: str | None = None) -> Iterator[Part]:
    """Yield the claim, maybe a remark, the final table in its parts, and how to read it."""
    lead, *items = claim(results).splitlines()
    yield Paragraph(lead)
    yield Items(tuple(item.removeprefix("- ") for item in items))
    if remark:
        yield Paragraph(remark)
    yield from tables.final_tables(results)
    yield Terms(legend.TITLE, tuple(legend.terms(results)))


def _quality(run: Snapshot, plots: Sequence[Chart]) -> Iterator[Part]:
    if run.results.evaluate:
        yield tables.steps(run.results)
        yield Paragraph(STEPS_NOTE, is_note=True)
        yield from plots
        yield tables.by_task(run.results)


def _plan(run: Snapshot, plots: Sequence[Chart]) -> Iterator[Part]:
    if run.best_plan is None:
        return
    yield PlanBar(tables.bar_of(run.best_plan))
    yield from plots
    if run.sensitivity:
        yield tables.methods(run.sensitivity, run.effects)
        yield Paragraph(_effects(run.effects), is_note=True)
        if numbering := tables.group_numbering(run.results.prune):
            yield Paragraph(numbering, is_note=True)
        yield tables.groups(run.sensitivity, run.effects, run.best_plan)


def _effects(effects: MarginalEffects | str) -> str:
    if isinstance(effects, str):
        return f"Rank correlations with what trials show were not computed: {effects}."
    return (
        f"Trials: least-squares main effects of {effects.num_trials} finished trials (residual {effects.residual:.4f} "
        "nats). Rank correlation is Spearman's with these, over groups and lower bits."
    )


def _search(run: Snapshot, plots: Sequence[Chart]) -> Iterator[Part]:
    search = run.results.search
    if search is None and run.state.search is None:
        return
    texts = search_text(search, run.trials) if search else _unfinished_search(run)
    yield from map(Paragraph, texts)
    yield from plots
    if search:
        yield tables.finalists(search)
        if search.front:
            yield tables.front(search)
    yield TrialsTable()
    yield tables.rungs(run)


def _unfinished_search(run: Snapshot) -> list[str]:
    """Describe how far a search came that has no record yet."""
    assert run.state.search
    counts = {word: sum(trial.status == name for trial in run.own_trials) for name, word in run.statuses.items()}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    of_all = f"{len(run.own_trials)} of {counted(run.state.search.max_trials, 'trial')}"
    lines = [f"{of_all} so far, budget {run.state.search.budget_bytes / 1e6:.1f} MB: {told or 'none yet'}."]
    if run.best_trial:
        lines.append(
            f"Best so far is trial {run.best_trial.index} ({run.best_trial.origin}), {run.metric_title} "
            f"{score(run.best_trial.rungs[-1], run.metric):.4f}. The rows that score it chose it, so it is flattered."
        )
    return lines


def _pruning(record: PruneRecord | None, plots: Sequence[Chart]) -> Iterator[Part]:
    if record:
        yield Paragraph(tables.prune_summary(record))
        yield from plots
        yield tables.kept_of_blocks(record)


def _repeat(run: Snapshot, config: str) -> Iterator[Part]:
    search = run.results.search
    is_given = search is not None and search.best_origin == GIVEN
    plan = ", let `search.plan` name a file with the plan below" if is_given else ""
    yield Paragraph(f"The last command, in `{run.state.folder}`:")
    yield Code(run.state.command)
    yield Paragraph(f"Or save the configuration below as `repeat.yaml`, name another `output`{plan}, and run:")
    yield Code("qpruner run repeat.yaml")
    facts = [("seed", f"{run.state.config['seed']}"), *run.state.environment.items()]
    if run.results.inference:  # of a worker, which a cluster has elsewhere
        facts.append(("rows measured on", run.results.inference.device))
    yield Table("Seed, versions and hardware", ("what", "which"), facts)
    yield Code(config, "yaml", "The configuration")
    if search and is_given:  # its file may be gone or changed
        yield Code(yaml.safe_dump(search.best_plan, sort_keys=False), "yaml", "The plan")
