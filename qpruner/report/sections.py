"""Builds the sections of a run's report, which both `report.html` and `report.md` show."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import yaml

from qpruner.data.measures import accuracy_in_full
from qpruner.plans.plan import PrecisionPlan, cut_title, in_base, plan_of
from qpruner.report import tables
from qpruner.report.claim import claim, finalists, headline
from qpruner.report.content import Code, Items, Paragraph, Part, Section, Table
from qpruner.report.overview import overview
from qpruner.report.plots.plans import kept_by_block, plan_bars
from qpruner.report.plots.search import score_by_bytes
from qpruner.report.served import served
from qpruner.report.snapshot import RUNNING, Snapshot
from qpruner.runs.records import GIVEN, Results, SearchRecord
from qpruner.search.progress import failing_devices, search_lines, search_progress
from qpruner.search.roles import finalist_title
from qpruner.search.trial_records import REMEDIES
from qpruner.wording import counted, duration


def sections(run: Snapshot) -> list[Section]:
    """Return the sections that are not empty for this run."""
    results = run.results
    listed = [
        Section("answer", headline(results) if run.is_complete else "So far", [*answer(run)]),
        Section("claim", "The claim and its tables", [*_claim(run)]),
        Section("quality", "Quality by task", [*_quality(run)]),
        Section("plans", "The plans", [*_plans(run)]),
        Section("search", "The search", [*_search(run)]),
        Section("pruning", "Pruning", [*_pruning(run)]),
        Section("cost", "Cost", [tables.stages(run)]),
        Section("repeat", "To repeat it", [*_repeat(run)]),
    ]
    return [section for section in listed if section.parts]


def answer(run: Snapshot) -> Iterator[Part]:
    """Yield the first screen: the winner beside its rivals, or how far the search is.

    The plot of all trials follows.
    """
    if run.is_complete:
        yield from overview(run.results)
    else:
        yield from map(Paragraph, _unfinished_search(run))
    chart = score_by_bytes(run)
    if chart:
        yield chart
    if run.how_to_compare:
        yield Paragraph(run.how_to_compare)


def _claim(run: Snapshot) -> Iterator[Part]:
    if run.is_complete:
        yield from measured(run.results)


def measured(results: Results) -> Iterator[Part]:
    """Yield the claim, the parts of the final table, and their legend."""
    lead, *items = claim(results).splitlines()
    yield Paragraph(lead)
    yield Items(tuple(item.removeprefix("- ") for item in items))
    if results.search and len(results.search.finalists) > 1:
        yield tables.fresh_scores(results.search)
    yield from tables.final_tables(results)
    if results.serve:
        yield served(results, results.serve)
    yield tables.legend(results)


def _quality(run: Snapshot) -> Iterator[Part]:
    if run.results.evaluate:
        yield tables.by_task(run.results)


def _plans(run: Snapshot) -> Iterator[Part]:
    search = run.results.search
    plans: dict[str, PrecisionPlan] = {}
    if search:
        for finalist in finalists(search):
            title = finalist_title(finalist, search)
            plans[f"{finalist.index}: {title}"] = plan_of(finalist)
    elif run.state.search:
        progress = search_progress(run.state.search, run.trials)
        titled = {"best so far": progress.best, "best control": progress.best_control}
        for title, trial in titled.items():
            if trial:
                plans[f"{trial.index}: {title}"] = plan_of(trial)
    if not plans:
        return

    for name, plan in plans.items():
        plans[name] = replace(plan, groups=_in_base(run, plan.cut, plan.groups))
    sensitivity = run.results.sensitivity
    bank = run.results.bank
    if sensitivity and bank:
        groups = _in_base(run, bank.cut, sensitivity.groups)
        sensitivity = sensitivity.model_copy(update={"groups": groups})
    yield plan_bars(plans, sensitivity)


def _in_base(run: Snapshot, cut: str, groups: Sequence[str]) -> tuple[str, ...]:
    """Name a cut's groups by the base model's block numbers."""
    record = run.results.prune.cuts.get(cut) if run.results.prune else None
    if record is None or not record.dropped_blocks:
        return tuple(groups)
    return in_base(groups, len(record.layers), record.dropped_blocks)


def _search(run: Snapshot) -> Iterator[Part]:
    search = run.results.search
    if search:
        remarks = [f"{line}." for line in failing_devices(run.own_trials)]
        yield Paragraph(" ".join([search_text(search), *remarks]))
        if not run.is_complete:  # otherwise the claim has this table
            yield tables.fresh_scores(search)
        if search.rungs:
            yield tables.rungs(search)
    pilot = run.results.pilot
    if pilot:
        yield Paragraph(f"Tried before the search: {pilot.text}.")
    if run.trials:
        yield tables.trials(run)


def search_text(search: SearchRecord) -> str:
    """Describe how the search ran."""
    by = "a given plan" if search.winner.origin == GIVEN else search.searcher
    what = "loss" if search.metric == "loss" else accuracy_in_full(search.metrics)
    gpus = f", {duration(search.total_gpu_seconds)} on GPUs" if search.total_gpu_seconds else ""
    text = (
        f"{by} on {what}, budget {search.budget_bytes / 1e6:.1f} MB: "
        f"{counted(search.num_trials, 'trial')}, {search.num_finished} finished, "
        f"{search.num_stopped} stopped early, {search.num_failed} failed, in "
        f"{duration(search.total_seconds)}{gpus}. It ended because {search.ended}."
    )
    if search.num_reused:
        text += f" It reused {counted(search.num_reused, 'trial')} of earlier searches."
    if search.sessions > 1:
        before = counted(search.resumed, "trial")
        text += (
            f" It ran in {search.sessions} sessions; the last began with {before} already recorded."
        )
    if search.failures:
        failed = [
            f"{number} {kind} ({REMEDIES[kind]})"
            for kind, number in sorted(search.failures.items())
        ]
        text += f" Failed: {', '.join(failed)}."
    return text


def _unfinished_search(run: Snapshot) -> list[str]:
    if run.state.search is None or run.results.search:
        return []
    progress = search_progress(run.state.search, run.trials)
    is_running = run.outcome == RUNNING
    lines = [f"{line}." for line, _ in search_lines(run.state.search, progress, is_running)]
    if progress.best:
        lines.append(
            "The best so far were chosen by the rows that score them, so this is optimistic."
        )
    return lines


def _pruning(run: Snapshot) -> Iterator[Part]:
    record = run.results.prune
    if record is None:
        return
    yield tables.cuts(record)
    left_out = run.results.left_out.items()
    if left_out:
        yield Items(tuple(f"{cut_title(cut)}: left out, because {why}" for cut, why in left_out))
    if len(record.cuts) > 1:
        yield kept_by_block(record.cuts)


def _repeat(run: Snapshot) -> Iterator[Part]:
    yield Paragraph(f"The last command, in `{run.state.folder}`:")
    yield Code(run.state.command)
    facts = [("seed", f"{run.state.config['seed']}"), *run.state.environment.items()]
    if run.results.inference:  # the device of a worker, maybe on another machine
        facts.append(("rows measured on", run.results.inference.device))
    if run.results.serve and run.results.serve.setting.build:
        facts.append(("llama.cpp", run.results.serve.setting.build))
    yield Table("Seed, versions and hardware", ("what", "which"), facts)
    yield Paragraph("The configuration:")
    yield Code(yaml.safe_dump(run.state.config, sort_keys=False), "yaml")
