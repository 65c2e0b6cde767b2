"""The report's sentences and tables, as the terminal, `report.md` and `report.html` show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import yaml

from qpruner.config.schema import EXPANSION, MEASUREMENT
from qpruner.data import measures
from qpruner.plans.plan import PrecisionPlan
from qpruner.report.differences import paired_losses
from qpruner.report.marginal_effects import MarginalEffects, rank_correlation
from qpruner.report.results import BASE, SEARCHED, Row, model_title, rows, under_first_seed
from qpruner.report.search_progress import score, score_name
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import (
    GIVEN,
    Confirmation,
    FreshScore,
    LayerWidths,
    MethodScores,
    PruneRecord,
    Results,
    RowScores,
    RungResult,
    SearchRecord,
    SensitivityRecord,
    TaskScore,
)
from qpruner.wording import counted, error_text

IMPORTANCE = (
    "Importance of every unit",
    "What pruning cuts by, block by block from the least to the most important unit; beside it the share of them that "
    "was kept.",
)
"""Title and caption of the map that pruning draws."""
LAYER_HEADINGS = ("block", "query heads", "key/value heads", "MLP channels", "kept parameters")
TEST_ACCURACY = "test accuracy"
TABLES = (
    (
        "Test results after the fine-tune, the same for every row; no plan was chosen by them",
        ("seeds", "bytes", "mean bits", TEST_ACCURACY, "test answer loss", "perplexity"),
    ),
    ("The fine-tune of each row", ("from", "seeds", "validation loss", "confirmation loss")),
    (
        "What each row takes to fine-tune and to use",
        ("parameters", "peak memory", "inference memory", "prefill tokens/s", "decode tokens/s"),
    ),
)
"""The final table in parts of which each fits 120 columns: captions, and headings beside the row's name."""
HEADINGS = ("row", *dict.fromkeys(heading for _, headings in TABLES for heading in headings))
ALIKE_HEADINGS = ("row", TEST_ACCURACY, "test answer loss", "perplexity", "validation loss", "confirmation loss")


FINALISTS_CAPTION = "Finalists on fresh rows"
FRONT_CAPTION = "Plans that none of fewer or equal bytes beats on fresh rows"
APART = "loss less the winner's, paired by row"
RUNGS_CAPTION = "Every trial at each rung, by optimizer step; a trial that was stopped or failed has none after it"
METHOD_HEADINGS = ("method", "what", "unit", "seconds", "rank correlation")
GROUPS_CAPTION = "What a method predicts that fewer bits cost, over the most bits a group may take"
STEP_HEADINGS = ("model", "scores", "answer loss", "perplexity")
STEPS_TEXT = (
    "The model as each step leaves it: base, pruned, quantized by the winner's plan (each quantized layer with the "
    "adapter start that its fine-tune begins with), fine-tuned; last, where it is a row, the base after the same "
    "fine-tune, with which the winner is to be compared. Where two accuracies are within their standard errors, "
    "the answer loss, which is finer, says more."
)
STAGE_HEADINGS = ("stage", "state", "seconds", "busy seconds", "GPU seconds")
STAGE_LEGEND = (
    "Seconds are what the stage took; busy seconds add up its parallel jobs; GPU seconds are those of its jobs times "
    "the GPUs that were held for them, busy or not: of stages before the search in the command that recorded them, of "
    "the others in all commands whose results stand."
)
STATUSES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "running"}
BEGUN = "begun"
"""The status, in words, of a trial that no command works on: the next one goes on with it."""
STATES = {"done": "done", "recorded": "recorded before", "running": "begun"}

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Caption, headings and cells."""


def cells(row: Row) -> tuple[str, ...]:
    """A row as the table shows it, on screen and in the report: a cell for each of `HEADINGS`."""
    return (
        row.title,
        _seeds(row),
        f"{row.measured_bytes / 1e6:.1f} MB",
        f"{row.mean_bits:.2f}",
        f"{_figure(row.accuracy, row.accuracy_spread, 3)}{error_text(row.accuracy_stderr, 3)}",
        "-" if row.answer_loss is None else _figure(row.answer_loss, row.answer_loss_spread),
        "-" if row.perplexity is None else _figure(row.perplexity, row.perplexity_spread, 2),
        row.origin,
        _figure(row.validation_loss, row.validation_loss_spread),
        _figure(row.confirmation_loss, row.confirmation_loss_spread),
        f"{row.num_parameters / 1e6:.1f} M",
        f"{row.peak_memory_bytes / 1e6:.0f} MB",
        "-" if row.inference_memory_bytes is None else f"{row.inference_memory_bytes / 1e6:.0f} MB",
        turns(row.prefill_tokens_per_second),
        turns(row.decode_tokens_per_second),
    )


def final_tables(results: Results) -> list[Table]:
    """The final table in parts, narrow enough for a terminal and for paper."""
    assert results.evaluate
    metrics = results.evaluate.metrics
    parts = [_part(caption, ("row", *headings), rows(results), metrics) for caption, headings in TABLES]
    alike = _alike_table(results, metrics)
    return [parts[0], *([alike] if alike else []), *parts[1:]]


def _alike_table(results: Results, metrics: Mapping[str, str]) -> Table | None:
    """Every row under one training seed, the first, which all of them had; None where all had equally many."""
    first = under_first_seed(results)
    if len({len(row.seeds) for row in rows(results)}) == 1:
        return None
    [seed] = first[0].seeds
    return _part(f"Like with like: every row under training seed {seed} alone", ALIKE_HEADINGS, first, metrics)


def _part(caption: str, headings: tuple[str, ...], of_rows: Sequence[Row], metrics: Mapping[str, str]) -> Table:
    """Some columns of the table; the accuracy's heading names the metric, the caption those of tasks that differ."""
    body = [dict(zip(HEADINGS, cells(row), strict=True)) for row in of_rows]
    name = measures.accuracy_name(metrics)
    shown = tuple(f"test {name}" if heading == TEST_ACCURACY else heading for heading in headings)
    if name == measures.ACCURACY and TEST_ACCURACY in headings:
        caption += f"; {measures.accuracy_in_full(metrics)}"
    return caption, shown, [tuple(line[heading] for heading in headings) for line in body]


def _seeds(row: Row) -> str:
    first, *others = row.seeds
    return f"{len(row.seeds)} ({first}-{others[-1]})" if others else f"1 ({first})"


def turns(figures: tuple[float, float, float] | None) -> str:
    """The median of several turns, and in brackets the least and the most."""
    if figures is None:
        return "-"
    median, least, most = (f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in figures)
    return f"{median} ({least}-{most})"


def _figure(value: float, spread: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def layer_cells(layer: LayerWidths) -> tuple[str, ...]:
    """A block as the prune table shows it."""
    groups, heads = len(layer.kept_kv_groups), layer.heads_per_group
    channels, base = len(layer.kept_mlp_channels), layer.base_mlp_channels
    if layer.base_experts:
        kept = len(layer.kept_experts or ())
        mlp = f"{kept} x {channels // max(kept, 1)} of {layer.base_experts} x {base // layer.base_experts}"
    else:
        mlp = f"{channels} of {base}"
    return (
        str(layer.layer),
        f"{groups * heads} of {layer.base_kv_groups * heads}",
        f"{groups} of {layer.base_kv_groups}",
        mlp,
        f"{layer.kept_parameters / layer.base_parameters:.1%}",
    )


def layers(record: PruneRecord) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What is left of each block: headings and cells; where whole blocks went, with its number in the pruned model."""
    body = [layer_cells(layer) for layer in record.layers]
    if not record.dropped_blocks:
        return LAYER_HEADINGS, body
    kept = iter(range(len(record.layers)))
    places = ["-" if layer.layer in record.dropped_blocks else f"{next(kept)}" for layer in record.layers]
    block, *others = LAYER_HEADINGS
    numbered = [(number, place, *cells) for (number, *cells), place in zip(body, places, strict=True)]
    return (block, "in the pruned model", *others), numbered


def group_numbering(record: PruneRecord | None) -> str:
    """That groups are not numbered as the base's blocks are, in a sentence; empty where no whole block went."""
    if record is None or not record.dropped_blocks:
        return ""
    *others, last = map(str, record.dropped_blocks)
    gone = f"blocks {', '.join(others)} and {last} are" if others else f"block {last} is"
    return f"Blocks are numbered as in the pruned model; the base's {gone} gone."


def block_numbering(record: PruneRecord) -> str:
    """The same of what is told of the base's blocks."""
    return "Blocks are numbered as in the base model." if record.dropped_blocks else ""


def prune_summary(record: PruneRecord) -> str:
    """The cut in a few lines."""
    dropped = f"; whole blocks removed: {', '.join(map(str, record.dropped_blocks))}" if record.dropped_blocks else ""
    return (
        f"{record.importance}, {record.selection}, compensation {record.compensation}: {record.target}, "
        f"{record.achieved}{dropped}.\n"
        f"{record.parameters_before:,} -> {record.parameters_after:,} parameters, {record.bytes_before / 1e6:.1f} -> "
        f"{record.bytes_after / 1e6:.1f} MB, {record.seconds:.1f} s, {record.peak_memory_bytes / 1e6:.0f} MB at most "
        f"above the loaded model ({record.memory_counter})."
    )


def statuses(run: Snapshot) -> dict[str, str]:
    """Every status of a trial in words."""
    return STATUSES if run.is_running else {**STATUSES, "running": BEGUN}


def unfinished_search_text(run: Snapshot) -> list[str]:
    """How far a search came that has no record yet."""
    assert run.state.search
    words = statuses(run)
    counts = {status: sum(trial.status == status for trial in run.own_trials) for status in words}
    told = ", ".join(f"{count} {word}" for status, word in words.items() if (count := counts[status]))
    of_all = f"{len(run.own_trials)} of {counted(run.state.search.max_trials, 'trial')}"
    budget = f"budget {run.state.search.budget_bytes / 1e6:.1f} MB"
    lines = [f"{of_all} so far, {budget}: {told or 'none yet'}."]
    if run.best_trial:
        lines.append(
            f"Best so far is trial {run.best_trial.index} ({run.best_trial.origin}), {run.metric_title} "
            f"{score(run.best_trial.rungs[-1], run.metric):.4f}. The rows that score it chose it, so it is flattered."
        )
    return lines


def rungs(run: Snapshot) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Every trial's figures at every rung: headings and cells."""
    by_trial = [{rung.step: rung for rung in trial.rungs} for trial in run.trials]
    steps = sorted({step for found in by_trial for step in found})
    names = [
        name
        for name in ("loss", "accuracy")
        if any(getattr(each, name) is not None for found in by_trial for each in found.values())
    ]
    shown = {"loss": "loss", "accuracy": measures.accuracy_name(run.state.search.metrics if run.state.search else {})}
    columns = [(name, step) for name in names for step in steps]

    def told(rung: RungResult | None, name: str) -> str:
        value = getattr(rung, name, None)
        return "-" if value is None else f"{value:.4f}"

    body = [
        (f"{trial.index}", trial.origin, *(told(found.get(step), name) for name, step in columns))
        for trial, found in zip(run.trials, by_trial, strict=True)
    ]
    return ("trial", "from", *(f"{shown[name]} at {step}" for name, step in columns)), body


def finalists(search: SearchRecord) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Who was scored on fresh rows: headings and cells."""
    best = next((each for each in search.confirmations if each.index == search.best_index), None)
    body = [
        (
            f"{each.index}",
            each.origin + (", taken over" if each.taken_over else ""),
            *_fresh(each),
            "-" if best in (None, each) else _less(each, best),
        )
        for each in search.confirmations
    ]
    return _filled(("trial", "from", *_fresh_headings(search), APART), body)


def _less(each: Confirmation, best: Confirmation) -> str:
    """A finalist's selection loss less the winner's, paired by row; what each loss's own error is mostly of, which rows
    there are, is in both."""
    apart = paired_losses(each, best)
    return "-" if apart is None else f"{apart.mean:+.4f}{error_text(apart.stderr, 4)}"


def front_caption(search: SearchRecord) -> str:
    """What the table of the front shows, and what the front is worth."""
    if search.hypervolume is None:  # a record of an older version
        return FRONT_CAPTION
    smallest = search.front[0]
    unit = "nats" if search.metric == "loss" else f"of {score_name(search)}"
    return (
        f"{FRONT_CAPTION}; hypervolume {search.hypervolume:.4f} {unit}: so much better than trial {smallest.index}, "
        "the smallest, the best plan inside a budget is there, in the mean over all budgets from its "
        f"{smallest.plan_bytes / 1e6:.1f} to {search.budget_bytes / 1e6:.1f} MB"
    )


def front(search: SearchRecord) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Plans that none of fewer or equal bytes beats on fresh rows: headings and cells."""
    body = [
        (f"{each.index}", each.origin, f"{each.plan_bytes / 1e6:.1f} MB", bar(each.plan), *_fresh(each))
        for each in search.front
    ]
    return _filled(("trial", "from", "bytes", "plan", *_fresh_headings(search)), body)


def _fresh_headings(search: SearchRecord) -> tuple[str, str]:
    return "selection loss", f"selection {measures.accuracy_name(search.metrics)}"


def _filled(
    headings: tuple[str, ...], body: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table without columns in which no row has a figure."""
    kept = [column for column in range(len(headings)) if any(row[column] != "-" for row in body)]
    return tuple(headings[column] for column in kept), [tuple(row[column] for column in kept) for row in body]


def bar(plan: dict[str, int]) -> str:
    """A plan as one character a group."""
    return str(PrecisionPlan.from_dict(plan))


def methods_caption(measured: SensitivityRecord) -> str:
    """What stands over the sensitivities, and which of them share a pass."""
    told = "Sensitivities"
    for together in (EXPANSION, MEASUREMENT):
        *others, last = [name for name in together if name in measured.methods] or [""]
        if others:
            told += f"; {', '.join(others)} and {last} come from one pass, and each has the seconds of all of it"
    return told


def methods(
    measured: SensitivityRecord, effects: MarginalEffects | str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Every sensitivity, what it took, and, where trials show enough, how it agrees with them: headings and cells."""
    body = [
        (name, method.source, method.unit, f"{method.seconds:.1f}", _correlation(method, effects))
        for name, method in measured.methods.items()
    ]
    return _filled(METHOD_HEADINGS, body)


def groups(
    measured: SensitivityRecord, effects: MarginalEffects | str, plan: dict[str, int] | None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What each method predicts that fewer bits cost each group, over the most bits it may take, beside the plan's bits
    and what trials show: headings and cells."""
    rises: dict[str, Sequence[float]] = {}
    *lower, highest = sorted({bits for method in measured.methods.values() for bits in method.values})
    for name, method in measured.methods.items():
        for bits in lower:
            pairs = zip(method.values[bits], method.values[highest], strict=True)
            rises[f"{name}, {bits} less {highest} bits"] = [low - high for low, high in pairs]
    if not isinstance(effects, str):
        rises |= {f"trials, {bits} less {highest} bits": values for bits, values in effects.values.items()}
    body = [
        (group, f"{plan[group]}" if plan else "-", *(f"{value:.3g}" for value in values))
        for group, *values in zip(measured.groups, *rises.values(), strict=True)
    ]
    return ("group", "bits", *rises), body


def effects_text(effects: MarginalEffects | str) -> str:
    """What the rank correlations are with, or why there are none."""
    if isinstance(effects, str):
        return f"Rank correlations with what trials show were not computed: {effects}."
    return (
        f"Trials: least-squares main effects of {effects.num_trials} finished trials (residual {effects.residual:.4f} "
        "nats). Rank correlation is Spearman's with these, over groups and lower bits."
    )


def stages(run: Snapshot) -> list[tuple[str, ...]]:
    """Every stage that was begun, its state and what it took in the command that recorded it; then all together."""
    busy = {"search": sum(interval.end - interval.start for interval in run.worker_intervals)}
    # Of the trials that other searches left, too.
    gpu = run.results.gpu_seconds | {"search": sum(trial.gpu_seconds for trial in run.trials)}
    if run.results.search:
        gpu["search"] += run.results.search.confirmation_gpu_seconds
    own = {each.digest for each in run.results.finetune.candidates} if run.results.finetune else set()
    taken = {each.digest: each.seconds for each in run.results.candidates}  # rows of one model share a fine-tune
    busy["finetune"] = sum(seconds for digest, seconds in taken.items() if digest in own)
    busy["comparison"] = sum(taken.values()) - busy["finetune"]

    def told(figures: dict[str, float], name: str) -> str:
        return f"{figures[name]:.1f}" if figures.get(name) else "-"

    begun = {name: stage for name, stage in run.state.stages.items() if name in Results.model_fields}
    seconds, gpu = ({name: each.get(name, 0.0) for name in begun} for each in (run.results.seconds, gpu))
    rows = [
        (name, STATES[stage.state], told(seconds, name), told(busy, name), told(gpu, name))
        for name, stage in begun.items()
    ]
    together = {"seconds": sum(seconds.values()), "gpu": sum(gpu.values())}
    return [*rows, ("all stages", "-", told(together, "seconds"), "-", told(together, "gpu"))]


def steps(results: Results) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The model as each step leaves it, its score on every task, and the finer losses that there are, fine-tuned under
    the first training seed, then the base fine-tuned: headings and cells."""
    untuned = [row for row in results.scores if row.seed is None]
    tuned = {row.name: row for row in reversed(results.scores) if row.seed is not None}
    body = [(model_title(row, results.search), *_step(row)) for row in untuned]
    for row in (tuned[name] for name in (SEARCHED, BASE) if name in tuned):
        body.append((f"{model_title(row, results.search)}, training seed {row.seed}", *_step(row)))
    return _filled(STEP_HEADINGS, body)


def _step(row: RowScores) -> tuple[str, str, str]:
    """Scores, answer loss (where every task has choices) and perplexity of a model."""
    losses = [score.answer_loss for score in row.scores]
    answer_loss = f"{measures.over_tasks(losses).mean:.4f}" if all(losses) else "-"
    return task_scores(row.scores), answer_loss, "-" if row.text_loss is None else f"{math.exp(row.text_loss):.2f}"


def given_plan(run: Snapshot) -> str | None:
    """The plan that was given, as `--plan` takes it: its file may be gone or changed. None where a search found it."""
    search = run.results.search
    return yaml.safe_dump(search.best_plan, sort_keys=False) if search and search.best_origin == GIVEN else None


def environment(run: Snapshot) -> list[tuple[str, str]]:
    """Versions and hardware where the command was started, and what the rows were measured on, which a cluster has
    elsewhere."""
    found = list(run.state.environment.items())
    if run.results.inference:
        found.append(("rows measured on", run.results.inference.device))
    return found


def task_scores(scores: tuple[TaskScore, ...]) -> str:
    """Every task's score in a line."""
    return ", ".join(
        f"{each.task} {each.metric} {each.value:.3f}{error_text(each.stderr, 3)} "
        f"({counted(each.num_questions, 'question')})"
        for each in scores
    )


def _fresh(score: FreshScore) -> tuple[str, str]:
    accuracy = "-" if score.accuracy is None else f"{score.accuracy:.3f}{error_text(score.accuracy_stderr, 3)}"
    return f"{score.loss:.4f}{error_text(score.stderr, 4)}", accuracy


def _correlation(method: MethodScores, effects: MarginalEffects | str) -> str:
    found = rank_correlation(method, effects)
    return "-" if found is None else f"{found:.2f}"
