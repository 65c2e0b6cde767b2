"""`report.md`: what came out, for people."""

from __future__ import annotations

from qpruner.records import LayerWidths, PruneRecord, Results, TaskScore
from qpruner.report.table import Row, claim, rows

LAYER_HEADINGS = ("block", "query heads", "key/value heads", "MLP channels", "kept parameters")
HEADINGS = ("row", "parameters", "bytes", "mean bits", "peak memory", "validation loss", "test accuracy")


def cells(row: Row) -> tuple[str, ...]:
    """A row as the table shows it, on screen and in the report."""
    return (
        row.name,
        f"{row.num_parameters / 1e6:.1f} M",
        f"{row.measured_bytes / 1e6:.1f} MB",
        f"{row.mean_bits:.2f}",
        f"{row.peak_memory_bytes / 1e6:.0f} MB",
        f"{row.validation_loss:.4f}",
        f"{row.accuracy:.3f} +- {row.accuracy_stderr:.3f}",
    )


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


def prune_summary(record: PruneRecord) -> str:
    """The cut in two lines."""
    dropped = f"; whole blocks removed: {', '.join(map(str, record.dropped_blocks))}" if record.dropped_blocks else ""
    return (
        f"{record.importance}, {record.selection}, compensation {record.compensation}: {record.target}, achieved "
        f"{record.achieved_rate:.2%}{dropped}.\n"
        f"{record.parameters_before:,} -> {record.parameters_after:,} parameters, {record.bytes_before / 1e6:.1f} -> "
        f"{record.bytes_after / 1e6:.1f} MB, {record.seconds:.1f} s, {record.peak_memory_bytes / 1e6:.0f} MB at most "
        f"above the loaded model ({record.memory_counter})."
    )


def render(results: Results, config_name: str, config_text: str, environment: dict[str, str]) -> str:
    """The whole report."""
    assert results.prune and results.sensitivity and results.bank and results.search and results.evaluate
    search, sensitivity = results.search, results.sensitivity
    lines = [
        f"# qpruner: {config_name}",
        "",
        _table(HEADINGS, [cells(row) for row in rows(results)]),
        "",
        claim(results),
        "",
        "Bytes are the packed tensors, scales, unquantized rest and adapters; mean bits are over the grouped weights. "
        "Every row had the same fine-tune; peak memory is that of the fine-tune, in a process of its own.",
        "",
        "## Before any fine-tune",
        "",
        *[
            f"- {name}: {_scores(scores)}"
            for name, scores in results.evaluate.scores.items()
            if name.endswith("(no fine-tune)")
        ],
        "",
        "## The search",
        "",
        f"{search.searcher}, budget {search.budget_bytes / 1e6:.1f} MB: {search.num_trials} trials, "
        f"{search.num_finished} finished, {search.num_stopped} stopped early, {search.num_failed} failed."
        + (f" Resumed with {search.resumed} trial(s) recorded before." if search.resumed else ""),
        "",
        _table(
            ("trial", "confirmation loss", "+-"),
            [(str(each.index), f"{each.loss:.4f}", f"{each.stderr:.4f}") for each in search.confirmations],
        ),
        "",
        "## Sensitivity and winner",
        "",
        f"Mutual information: {sensitivity.source}; {sensitivity.estimator}; {sensitivity.bias}.",
        "",
        _table(
            ("group", "mutual information (nats)", "bits of the winner"),
            [
                (name, f"{value:.4f}", str(search.best_plan[name]))
                for name, value in zip(sensitivity.groups, sensitivity.mutual_information_nats, strict=True)
            ],
        ),
        "",
        "## Pruning",
        "",
        prune_summary(results.prune),
        "",
        "![importance of every unit and what was kept](prune/importance.png)",
        "",
        _table(LAYER_HEADINGS, [layer_cells(layer) for layer in results.prune.layers]),
        "",
        "## To repeat it",
        "",
        *[f"- {name}: {value}" for name, value in environment.items()],
        "",
        "```yaml",
        config_text.rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _table(headings: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _scores(scores: tuple[TaskScore, ...]) -> str:
    return ", ".join(
        f"{score.task} {score.metric} {score.value:.3f} +- {score.stderr:.3f} ({score.num_questions} questions)"
        for score in scores
    )
