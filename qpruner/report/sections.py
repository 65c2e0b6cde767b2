"""Builds the sections of a run's report, which both `report.html` and `report.md` show."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import yaml

from qpruner.data.measures import accuracy_in_full
from qpruner.plans.plan import cut_title, in_base, plan_of
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
    listed: list[tuple[str, str, Iterator[Part]]] = [
        ("answer", headline(run.results) if run.is_complete else "So far", answer(run)),
        (
            "claim",
            "The claim and its tables",
            measured(run.results) if run.is_complete else iter(()),
        ),
        (
            "quality",
            "Quality by task",
            iter([tables.by_task(run.results)] if run.results.evaluate else ()),
        ),
        ("plans", "The plans", _plans(run)),
        ("search", "The search", _search(run)),
        ("pruning", "Pruning", _pruning(run)),
        ("cost", "Cost", iter([tables.stages(run)])),
        ("repeat", "To repeat it", _repeat(run)),
    ]
    found = [Section(name, heading, list(parts)) for name, heading, parts in listed]
    return [section for section in found if section.parts]


def answer(run: Snapshot) -> Iterator[Part]:
    """Yield the first screen: the winner beside its rivals, or how far the search is.

    The picture follows.
    """
    parts: list[Part | None] = [*map(Paragraph, _unfinished_search(run))]
    if run.is_complete:
        parts = [*overview(run.results)]
    parts += [score_by_bytes(run), Paragraph(how) if (how := run.how_to_compare) else None]
    yield from filter(None, parts)


def measured(results: Results) -> Iterator[Part]:
    """Yield the claim, the parts of the final table, and their legend."""
    lead, *items = claim(results).splitlines()
    yield Paragraph(lead)
    yield Items(tuple(item.removeprefix("- ") for item in items))
    if results.search and len(results.search.finalists) > 1:
        yield tables.fresh_scores(results.search)
    yield from filter(
        None, [*tables.final_tables(results), served(results), tables.legend(results)]
    )


def _plans(run: Snapshot) -> Iterator[Part]:
    search, shown = run.results.search, {}
    if search:
        shown = {
            f"{finalist.index}: {finalist_title(finalist, search)}": plan_of(finalist)
            for finalist in finalists(search)
        }
    elif run.state.search:
        now = search_progress(run.state.search, run.trials)
        found = (("best so far", now.best), ("best control", now.best_control))
        shown = {f"{trial.index}: {title}": plan_of(trial) for title, trial in found if trial}
    if shown:
        measured, bank = run.results.sensitivity, run.results.bank
        if measured and bank:
            measured = measured.model_copy(
                update={"groups": _in_base(run, bank.cut, measured.groups)}
            )
        named = {
            name: replace(plan, groups=_in_base(run, plan.cut, plan.groups))
            for name, plan in shown.items()
        }
        yield plan_bars(named, measured)


def _in_base(run: Snapshot, cut: str, groups: Sequence[str]) -> tuple[str, ...]:
    """Name a cut's groups by the base model's block numbers."""
    made = run.results.prune.cuts.get(cut) if run.results.prune else None
    return (
        in_base(groups, len(made.layers), made.dropped_blocks)
        if made and made.dropped_blocks
        else tuple(groups)
    )


def _search(run: Snapshot) -> Iterator[Part]:
    if search := run.results.search:
        yield Paragraph(
            " ".join(
                [search_text(search), *(f"{line}." for line in failing_devices(run.own_trials))]
            )
        )
        if not run.is_complete:  # else the claim has it
            yield tables.fresh_scores(search)
        if search.rungs:
            yield tables.rungs(search)
    if run.trials:
        yield tables.trials(run)


def search_text(search: SearchRecord) -> str:
    """Describe how the search ran."""
    by = "a given plan" if search.best_origin == GIVEN else search.searcher
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
    is_running = run.outcome == RUNNING
    now = search_progress(run.state.search, run.trials)
    lines = [f"{line}." for line, _ in search_lines(run.state.search, now, is_running)]
    remark = "The best so far were chosen by the rows that score them, so this is optimistic."
    return [*lines, remark] if now.best else lines


def _pruning(run: Snapshot) -> Iterator[Part]:
    if record := run.results.prune:
        yield tables.cuts(record)
        if left_out := run.results.left_out:
            yield Items(
                tuple(
                    f"{cut_title(name)}: left out, because {why}" for name, why in left_out.items()
                )
            )
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
