"""`report.md`: what came out, for people."""

from __future__ import annotations

from qpruner.records import Results, TaskScore
from qpruner.report.table import Row, claim, rows

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
        f"{results.prune.importance}, {results.prune.selection}: {results.prune.parameters_before:,} -> "
        f"{results.prune.parameters_after:,} parameters (target {results.prune.target_rate:.2%}, achieved "
        f"{results.prune.achieved_rate:.2%}).",
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
