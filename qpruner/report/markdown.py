"""`report.md`: what came out, for people."""

from __future__ import annotations

from collections.abc import Sequence

from qpruner.plan import PrecisionPlan
from qpruner.records import (
    FreshScore,
    LayerWidths,
    MethodScores,
    PruneRecord,
    Results,
    SearchRecord,
    SensitivityRecord,
    TaskScore,
)
from qpruner.report.marginal_effects import MarginalEffects, rank_correlation
from qpruner.report.table import Row, claim, rows

LAYER_HEADINGS = ("block", "query heads", "key/value heads", "MLP channels", "kept parameters")
HEADINGS = (
    "row",
    "from",
    "training seeds",
    "parameters",
    "bytes",
    "mean bits",
    "peak memory",
    "validation loss",
    "confirmation loss",
    "test accuracy",
    "test answer loss",
)
LEGEND = (
    "Bytes are the packed tensors, scales, unquantized rest and adapters; mean bits are over the grouped weights; peak "
    "memory is that of the fine-tune, in a process of its own. Every row had the same fine-tune. A row with several "
    "training seeds (data order and dropout; adapter starts are the same) shows means and, after +-, their standard "
    "deviation over seeds; q is the standard error of an accuracy over questions. In the claim an interval is the "
    "wider of Student's over seeds and the paired one over questions, each at 95 % by itself. The confirmation rows "
    "have scored no trial, but chose the winner and the best seed, whose losses on them are a little flattered; the "
    "test questions have chosen nothing."
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as the table shows it, on screen and in the report."""
    seeds = row.seeds
    return (
        row.name,
        row.origin,
        f"{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}",
        f"{row.num_parameters / 1e6:.1f} M",
        f"{row.measured_bytes / 1e6:.1f} MB",
        f"{row.mean_bits:.2f}",
        f"{row.peak_memory_bytes / 1e6:.0f} MB",
        _figure(row.validation_loss, row.validation_loss_spread),
        _figure(row.confirmation_loss, row.confirmation_loss_spread),
        f"{_figure(row.accuracy, row.accuracy_spread, 3)} (q {row.accuracy_stderr:.3f})",
        "-" if row.answer_loss is None else _figure(row.answer_loss, row.answer_loss_spread),
    )


def _figure(value: float, spread: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" + (f" +- {spread:.{digits}f}" if spread is not None else "")


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


def render(
    results: Results,
    effects: MarginalEffects | str,
    config_name: str,
    config_text: str,
    environment: dict[str, str],
) -> str:
    """The whole report.

    Args:
        results: Every record of the run.
        effects: What the finished trials show of each group, or why they show nothing.
        config_name: Of the run.
        config_text: The configuration as YAML.
        environment: Versions by package.
    """
    assert results.prune and results.sensitivity and results.search and results.evaluate
    lines = [
        f"# qpruner: {config_name}",
        "",
        pipe_table(HEADINGS, [cells(row) for row in rows(results)]),
        "",
        claim(results),
        "",
        LEGEND,
        "",
        "## Before any fine-tune",
        "",
        *[f"- {row.name}: {_scores(row.scores)}" for row in results.evaluate.rows if row.seed is None],
        "",
        "## The search",
        "",
        *_search(results.search),
        "",
        "## Sensitivities and winner",
        "",
        *_sensitivities(results.sensitivity, effects, results.search.best_plan),
        "",
        "## Pruning",
        "",
        prune_summary(results.prune),
        "",
        "![importance of every unit and what was kept](prune/importance.png)",
        "",
        pipe_table(LAYER_HEADINGS, [layer_cells(layer) for layer in results.prune.layers]),
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


def _search(search: SearchRecord) -> list[str]:
    """What ran, why it ended, who was confirmed, and the front where there is one."""
    told = (
        f"{search.searcher} on {search.metric}, budget {search.budget_bytes / 1e6:.1f} MB: {search.num_trials} trials, "
        f"{search.num_finished} finished, {search.num_stopped} stopped early, {search.num_failed} failed, in "
        f"{search.search_seconds / 3600:.2f} hours"
        + (f" and {search.gpu_seconds / 3600:.2f} GPU hours" if search.gpu_seconds else "")
        + f". It ended because {search.ended}."
    )
    if search.num_taken_over:
        told += f" It started from {search.num_taken_over} trial(s) that searches with another budget or searcher left."
    if search.resumed:
        told += f" Resumed with {search.resumed} trial(s) recorded before."
    outcome = "a control: no searched plan beat it" if search.control_won else "a searched plan"
    lines = [
        told,
        "",
        f"On fresh rows trial {search.best_index} ({search.best_origin}) was best, {outcome}.",
        "",
        pipe_table(
            ("trial", "from", "confirmation loss", "accuracy"),
            [
                (f"{each.index}", each.origin + (", taken over" if each.taken_over else ""), *_fresh(each))
                for each in search.confirmations
            ],
        ),
    ]
    if search.front:
        front = [
            (f"{each.index}", each.origin, f"{each.plan_bytes / 1e6:.1f} MB", _bar(each.plan), *_fresh(each))
            for each in search.front
        ]
        headings = ("trial", "from", "bytes", "plan", "confirmation loss", "accuracy")
        lines += ["", "Plans that none of fewer or equal bytes beats on fresh rows:", "", pipe_table(headings, front)]
    return lines


def _fresh(score: FreshScore) -> tuple[str, str]:
    accuracy = "-" if score.accuracy is None else f"{score.accuracy:.3f} +- {score.accuracy_stderr:.3f}"
    return f"{score.loss:.4f} +- {score.stderr:.4f}", accuracy


def _bar(plan: dict[str, int]) -> str:
    return str(PrecisionPlan.from_dict(plan))


def _sensitivities(measured: SensitivityRecord, effects: MarginalEffects | str, winner: dict[str, int]) -> list[str]:
    """Every method beside what trials show, and the winner's bits."""
    methods = measured.methods
    if isinstance(effects, str):
        compared = f"No rank correlation with what trials show: {effects}."
    else:
        compared = (
            f"Trials: least-squares main effects of {effects.num_trials} finished trials (residual "
            f"{effects.residual:.4f} nats). Rank correlation is Spearman's with these, over groups and lower bits."
        )
    rises: dict[str, Sequence[float]] = {}
    for name, method in methods.items():
        *lower, highest = sorted(method.values)
        for bits in lower:
            pairs = zip(method.values[bits], method.values[highest], strict=True)
            rises[f"{name} at {bits}"] = [low - high for low, high in pairs]
    if not isinstance(effects, str):
        rises |= {f"trials at {bits}": values for bits, values in effects.values.items()}
    body = zip(measured.groups, *rises.values(), strict=True)
    return [
        "What a method predicts that fewer bits cost, over the most bits a group may take.",
        "",
        pipe_table(
            ("method", "what", "unit", "seconds", "rank correlation"),
            [
                (name, method.source, method.unit, f"{method.seconds:.1f}", _correlation(method, effects))
                for name, method in methods.items()
            ],
        ),
        "",
        compared,
        "",
        pipe_table(
            ("group", "bits of the winner", *rises),
            [(group, f"{winner[group]}", *(f"{value:.3g}" for value in values)) for group, *values in body],
        ),
    ]


def _correlation(method: MethodScores, effects: MarginalEffects | str) -> str:
    found = rank_correlation(method, effects)
    return "-" if found is None else f"{found:.2f}"


def pipe_table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _scores(scores: tuple[TaskScore, ...]) -> str:
    return ", ".join(
        f"{score.task} {score.metric} {score.value:.3f} +- {score.stderr:.3f} ({score.num_questions} questions)"
        for score in scores
    )
