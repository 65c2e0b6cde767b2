"""Lays the figures of a run out in tables, as the terminal, `report.md` and `report.html` show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qpruner.config.schema import EXPANSION, MEASUREMENT
from qpruner.data import measures
from qpruner.plans.plan import PrecisionPlan
from qpruner.report.content import Table
from qpruner.report.results import (
    BASE,
    SEARCHED,
    Row,
    Turns,
    model_title,
    rows,
    task_accuracies,
    under_first_seed,
    untuned_accuracies,
)
from qpruner.report.search_progress import bar, score, score_name, score_title
from qpruner.report.snapshot import Snapshot
from qpruner.report.statistics import paired_losses
from qpruner.runs.records import (
    Confirmation,
    FreshScore,
    LayerWidths,
    PruneRecord,
    Results,
    RowScores,
    SearchRecord,
    SensitivityRecord,
)
from qpruner.wording import counted, error_text

TEST_ACCURACY = "test accuracy"
FINAL = (
    (
        "Test results after the fine-tune, the same for every row; no plan was chosen by them",
        ("row", "seeds", "bytes", "mean bits", TEST_ACCURACY, "test answer loss", "perplexity"),
    ),
    ("The fine-tune of each row", ("row", "from", "seeds", "validation loss", "confirmation loss")),
    (
        "What each row takes to fine-tune and to use",
        ("row", "parameters", "peak memory", "inference memory", "prefill tokens/s", "decode tokens/s"),
    ),
)
"""The final table in parts of which each fits 120 columns."""
ALIKE = ("row", TEST_ACCURACY, "test answer loss", "perplexity", "validation loss", "confirmation loss")
STATES = {"done": "done", "recorded": "recorded before", "running": "begun"}


def winner(run: Snapshot) -> Table:
    """Show a whole run's winner in figures: its size, its accuracy, its plan."""
    assert run.results.search and run.results.prune and run.results.evaluate
    table, search, prune = rows(run.results), run.results.search, run.results.prune
    row = next(row for row in table if row.name == SEARCHED)
    asked = [f"{name} {value}" for name, value in run.state.config["quantize"]["budget"].items() if value is not None]
    base, pruned, budget = map(_megabytes, (prune.bytes_before, prune.bytes_after, search.budget_bytes))
    size = (
        f"{prune.bytes_before / row.measured_bytes:.1f} times smaller than the base model's {base}, {pruned} after "
        f"pruning; budget {budget} (quantize.budget: {', '.join(asked)}), adapter included"
    )
    half_width = measures.Z_95 * row.accuracy_stderr
    low, high = max(0.0, row.accuracy - half_width), min(1.0, row.accuracy + half_width)
    untuned = untuned_accuracies(run.results).items()
    accuracy = [f"95 % interval over questions {low:.3f} to {high:.3f}"]
    accuracy += [f"{name}, not fine-tuned: {value:.3f}" for name, value in untuned if len(table) == 1]
    levels = list(search.best_plan.values())
    counts = ", ".join(f"{levels.count(level)} at {level} bits" for level in sorted(set(levels)))
    body = [
        ("size", _megabytes(row.measured_bytes), size),
        (f"test {measures.accuracy_name(run.results.evaluate.metrics)}", f"{row.accuracy:.3f}", "; ".join(accuracy)),
        ("plan", f"{row.mean_bits:.2f} mean bits", f"{len(levels)} groups: {counts}; from {row.origin}"),
    ]
    return Table(f"The {run.best_title}", ("what", "figure", "about it"), body)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def cells(row: Row) -> dict[str, str]:
    """Format a row of the final table: heading -> cell."""
    first, *others = row.seeds
    return {
        "row": row.title,
        "seeds": f"{len(row.seeds)} ({first}-{others[-1]})" if others else f"1 ({first})",
        "bytes": f"{row.measured_bytes / 1e6:.1f} MB",
        "mean bits": f"{row.mean_bits:.2f}",
        TEST_ACCURACY: f"{_figure(row.accuracy, row.accuracy_spread, 3)}{error_text(row.accuracy_stderr, 3)}",
        "test answer loss": _figure(row.answer_loss, row.answer_loss_spread),
        "perplexity": _figure(row.perplexity, row.perplexity_spread, 2),
        "from": row.origin,
        "validation loss": _figure(row.validation_loss, row.validation_loss_spread),
        "confirmation loss": _figure(row.confirmation_loss, row.confirmation_loss_spread),
        "parameters": f"{row.num_parameters / 1e6:.1f} M",
        "peak memory": f"{row.peak_memory_bytes / 1e6:.0f} MB",
        "inference memory": "-" if row.inference_memory_bytes is None else f"{row.inference_memory_bytes / 1e6:.0f} MB",
        "prefill tokens/s": turns_text(row.prefill_tokens_per_second),
        "decode tokens/s": turns_text(row.decode_tokens_per_second),
    }


def final_tables(results: Results) -> list[Table]:
    """Lay the final table out in parts that fit a terminal and paper.

    Where rows have unequally many training seeds, the second part has every row under the first, which all had.
    """
    every, alike = rows(results), under_first_seed(results)
    first, *others = (_final(results, caption, headings, every) for caption, headings in FINAL)
    if len({len(row.seeds) for row in every}) == 1:
        return [first, *others]
    caption = f"Like with like: every row under training seed {alike[0].seeds[0]} alone"
    return [first, _final(results, caption, ALIKE, alike), *others]


def _final(results: Results, caption: str, headings: tuple[str, ...], of_rows: Sequence[Row]) -> Table:
    """Lay out some columns; the accuracy's heading names the metric, the caption those of tasks that differ."""
    assert results.evaluate
    name = measures.accuracy_name(results.evaluate.metrics)
    if name == measures.ACCURACY and TEST_ACCURACY in headings:
        caption += f"; {measures.accuracy_in_full(results.evaluate.metrics)}"
    shown = tuple(f"test {name}" if heading == TEST_ACCURACY else heading for heading in headings)
    body = [cells(row) for row in of_rows]
    return Table(caption, shown, [tuple(line[heading] for heading in headings) for line in body])


def turns_text(figures: Turns | None) -> str:
    """Format a median and, in brackets, the least and the most."""
    if figures is None:
        return "-"
    median, least, most = (f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in figures)
    return f"{median} ({least}-{most})"


def _figure(value: float | None, spread: float | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def steps(results: Results) -> Table:
    """Show the model as each step leaves it: base, pruned, quantized, fine-tuned; last the base fine-tuned."""
    tuned = {row.name: row for row in reversed(results.scores) if row.seed is not None}
    body = [(model_title(row, results.search), *_step(row)) for row in results.scores if row.seed is None]
    for row in (tuned[name] for name in (SEARCHED, BASE) if name in tuned):
        body.append((f"{model_title(row, results.search)}, training seed {row.seed}", *_step(row)))
    return Table("Step by step", ("model", "scores", "answer loss", "perplexity"), body).without_empty_columns()


def _step(row: RowScores) -> tuple[str, str, str]:
    scores = ", ".join(
        f"{each.task} {each.metric} {each.value:.3f}{error_text(each.stderr, 3)} "
        f"({counted(each.num_questions, 'question')})"
        for each in row.scores
    )
    losses = [score.answer_loss for score in row.scores]
    answer_loss = f"{measures.over_tasks(losses).mean:.4f}" if all(losses) else "-"
    return scores, answer_loss, "-" if row.text_loss is None else f"{math.exp(row.text_loss):.2f}"


def by_task(results: Results) -> Table:
    """Show every row's accuracy on every held-out task with its interval."""
    found = task_accuracies(results)
    headings = [
        f"{task} {metric} ({counted(of_rows[0].num_questions, 'question')})"
        for (task, metric), of_rows in found.items()
    ]
    body: dict[str, list[str]] = {}
    for of_rows in found.values():
        for each in of_rows:
            body.setdefault(each.row, []).append(f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})")
    caption = "Accuracy on each held-out task; in brackets its 95 % interval over questions"
    return Table(caption, ("row", *headings), [(row, *line) for row, line in body.items()], "Every row on every task")


def kept_of_blocks(record: PruneRecord) -> Table:
    """Show what is left of each block; where whole blocks were removed, with its number in the pruned model."""
    headings = ("block", "query heads", "key/value heads", "MLP channels", "kept parameters")
    table = Table("Kept of each block", headings, [block_cells(layer) for layer in record.layers], "Every block")
    if not record.dropped_blocks:
        return table
    kept = iter(range(len(record.layers)))
    places = ["-" if layer.layer in record.dropped_blocks else f"{next(kept)}" for layer in record.layers]
    body = [(line[0], place, *line[1:]) for line, place in zip(table.rows, places, strict=True)]
    return replace(table, headings=(headings[0], "in the pruned model", *headings[1:]), rows=body)


def block_cells(layer: LayerWidths) -> tuple[str, ...]:
    """Format a block's row of that table."""
    groups, heads = len(layer.kept_kv_groups), layer.heads_per_group
    channels, base = len(layer.kept_mlp_channels), layer.base_mlp_channels
    mlp = f"{channels} of {base}"
    if layer.base_experts:
        kept = len(layer.kept_experts or ())
        mlp = f"{kept} x {channels // max(kept, 1)} of {layer.base_experts} x {base // layer.base_experts}"
    return (
        str(layer.layer),
        f"{groups * heads} of {layer.base_kv_groups * heads}",
        f"{groups} of {layer.base_kv_groups}",
        mlp,
        f"{layer.kept_parameters / layer.base_parameters:.1%}",
    )


def prune_summary(record: PruneRecord) -> str:
    """Describe the cut in a few lines."""
    dropped = f"; whole blocks removed: {', '.join(map(str, record.dropped_blocks))}" if record.dropped_blocks else ""
    return (
        f"{record.importance}, {record.selection}, compensation {record.compensation}: {record.target}, "
        f"{record.achieved}{dropped}.\n"
        f"{record.parameters_before:,} -> {record.parameters_after:,} parameters, {record.bytes_before / 1e6:.1f} -> "
        f"{record.bytes_after / 1e6:.1f} MB, {record.seconds:.1f} s, {record.peak_memory_bytes / 1e6:.0f} MB at most "
        f"above the loaded model ({record.memory_counter})."
    )


def group_numbering(record: PruneRecord | None) -> str:
    """Tell that groups are not numbered as the base's blocks are; empty where no whole block was removed."""
    if record is None or not record.dropped_blocks:
        return ""
    *others, last = map(str, record.dropped_blocks)
    gone = f"blocks {', '.join(others)} and {last} are" if others else f"block {last} is"
    return f"Blocks are numbered as in the pruned model; the base's {gone} gone."


def trials(run: Snapshot) -> Table:
    """Show every trial with the score of its last rung."""
    body = []
    for trial in run.trials:
        last = trial.rungs[-1] if trial.rungs else None
        body.append(
            (
                f"{trial.index}",
                trial.origin if trial in run.own_trials else f"{trial.origin}, another search",
                run.statuses[trial.status] + (f", {run.best_title}" if trial == run.best_trial else ""),
                f"{trial.plan_bytes / 1e6:.2f}",
                f"{trial.mean_bits:.2f}",
                f"{score(last, run.metric):.4f}" if last else "-",
                f"{last.step}" if last else "-",
                f"{trial.seconds:.0f}",
                bar(trial),
                trial.reason or "-",
            )
        )
    title = score_title(run.state.search) if run.state.search else "score"
    headings = ("trial", "from", "status", "MB", "mean bits", title, "step", "seconds", "plan", "reason")
    caption = "Plans as a bar: a character a group, in model order (F is 16). The score is that of the last rung."
    return Table(caption, headings, body, "Every trial", is_on_page_only=True).without_empty_columns()


def finalists(search: SearchRecord) -> Table:
    """Show who was scored on fresh rows, and the loss less the winner's, paired by row.

    Each loss's own error is mostly of which rows there are, which is in both.
    """
    best = next((each for each in search.confirmations if each.index == search.best_index), None)
    body = []
    for each in search.confirmations:
        origin = each.origin + (", reused" if each.reused else "")
        body.append((f"{each.index}", origin, *_fresh(each), "-" if best in (None, each) else _less(each, best)))
    headings = ("trial", "from", *_fresh_headings(search), "loss less the winner's, paired by row")
    return Table("Finalists on fresh rows", headings, body).without_empty_columns()


def _less(each: Confirmation, best: Confirmation) -> str:
    apart = paired_losses(each, best)
    return "-" if apart is None else f"{apart.mean:+.4f}{error_text(apart.stderr, 4)}"


def front(search: SearchRecord) -> Table:
    """Show the plans that none of fewer or equal bytes beats on fresh rows; the caption has their hypervolume."""
    caption = "Plans that none of fewer or equal bytes beats on fresh rows"
    if search.hypervolume is not None:
        unit = "nats" if search.metric == "loss" else f"of {score_name(search)}"
        caption += (
            f"; hypervolume {search.hypervolume:.4f} {unit}: so much better than the smallest is the best plan inside "
            "a budget, in the mean over all budgets from the smallest's bytes to the run's"
        )
    body = [
        (
            f"{each.index}",
            each.origin,
            f"{each.plan_bytes / 1e6:.1f} MB",
            str(PrecisionPlan.from_dict(each.plan)),
            *_fresh(each),
        )
        for each in search.front
    ]
    headings = ("trial", "from", "bytes", "plan", *_fresh_headings(search))
    return Table(caption, headings, body).without_empty_columns()


def _fresh_headings(search: SearchRecord) -> tuple[str, str]:
    return "selection loss", f"selection {measures.accuracy_name(search.metrics)}"


def _fresh(score: FreshScore) -> tuple[str, str]:
    accuracy = "-" if score.accuracy is None else f"{score.accuracy:.3f}{error_text(score.accuracy_stderr, 3)}"
    return f"{score.loss:.4f}{error_text(score.stderr, 4)}", accuracy


def methods(measured: SensitivityRecord) -> Table:
    """Show every sensitivity and what it took."""
    caption = "Sensitivities"
    for together in (EXPANSION, MEASUREMENT):
        *others, last = [name for name in together if name in measured.methods] or [""]
        if others:
            caption += f"; {', '.join(others)} and {last} come from one pass, and each has the seconds of all of it"
    body = [(name, each.source, each.unit, f"{each.seconds:.1f}") for name, each in measured.methods.items()]
    return Table(caption, ("method", "what", "unit", "seconds"), body)


def groups(measured: SensitivityRecord, plan: dict[str, int] | None) -> Table:
    """Show the plan's bits of each group beside what methods predict that fewer bits cost."""
    rises: dict[str, Sequence[float]] = {}
    *lower, highest = sorted({bits for method in measured.methods.values() for bits in method.values})
    for name, method in measured.methods.items():
        for bits in lower:
            pairs = zip(method.values[bits], method.values[highest], strict=True)
            rises[f"{name}, {bits} less {highest} bits"] = [low - high for low, high in pairs]
    body = [
        (group, f"{plan[group]}" if plan else "-", *(f"{value:.3g}" for value in values))
        for group, *values in zip(measured.groups, *rises.values(), strict=True)
    ]
    caption = "What a method predicts that fewer bits cost, over the most bits a group may take"
    return Table(caption, ("group", "bits", *rises), body, "Every group")


def stages(run: Snapshot) -> Table:
    """Show every stage that was begun, its state and what it took; then all together."""
    # Of the trials that other searches left, too.
    busy = {"search": sum(trial.seconds for trial in run.trials)}
    gpu = run.results.gpu_seconds | {"search": sum(trial.gpu_seconds for trial in run.trials)}
    if run.results.search:
        gpu["search"] += run.results.search.confirmation_gpu_seconds
    own = {each.digest for each in run.results.finetune.candidates} if run.results.finetune else set()
    taken = {each.digest: each.seconds for each in run.results.candidates}  # rows of one model share a fine-tune
    busy["finetune"] = sum(seconds for digest, seconds in taken.items() if digest in own)
    busy["comparison"] = sum(taken.values()) - busy["finetune"]
    begun = {name: stage.state for name, stage in run.state.stages.items() if name in Results.model_fields}
    figures = (run.results.seconds, busy, gpu)
    body = [(name, STATES[state], *(_seconds(each.get(name)) for each in figures)) for name, state in begun.items()]
    seconds, _, held = (_seconds(sum(each.get(name, 0.0) for name in begun)) for each in figures)
    headings = ("stage", "state", "seconds", "busy seconds", "GPU seconds")
    return Table("Stages", headings, [*body, ("all stages", "-", seconds, "-", held)])


def _seconds(value: float | None) -> str:
    return f"{value:.1f}" if value else "-"
