"""Builds the tables of a run's figures, which the terminal, `report.md` and `report.html` show."""

import statistics
from collections.abc import Sequence

from qpruner.data import measures
from qpruner.plans.plan import UNPRUNED, cut_title, formats_text, plan_of
from qpruner.quantization.formats import by_size, format_of
from qpruner.report.claim import difference_from, finalists
from qpruner.report.content import ComparedCell, Table
from qpruner.report.results import TableRow, answer_losses, perplexities, rows, speed_text
from qpruner.report.snapshot import STATUSES, Snapshot
from qpruner.runs.records import (
    RANDOM,
    SEARCHED,
    Finalist,
    FineTune,
    PruneRecord,
    Results,
    SearchRecord,
    TaskScore,
)
from qpruner.search.choice import SAME_BYTES
from qpruner.search.progress import score_title
from qpruner.search.roles import finalist_title, title_of
from qpruner.wording import counted, error_text

TEST_ACCURACY = "test accuracy"
FINAL = (
    (
        (
            "Test results after the fine-tune, which is the same for every row; no plan was chosen "
            "by these results"
        ),
        ("row", "seeds", "bytes", "mean bits", TEST_ACCURACY, "test answer loss", "perplexity"),
    ),
    ("The fine-tune of each row", ("row", "cut", "from", "seeds", "confirmation loss")),
    (
        "Size of each row, and its memory and speed in transformers",
        (
            "row",
            "parameters",
            "peak memory",
            "inference memory",
            "prefill tokens/s",
            "decode tokens/s",
        ),
    ),
)
"""Caption and columns of each part of the final table; each part fits 120 characters of width."""
TERMS = {
    "..., uniform": (
        "a cut, or the base model (not pruned), with every group in the format that fits best."
    ),
    "..., knapsack": "the same with the best plan by a sensitivity.",
    "the paper's flow": "what the flow of the QPruner paper gives at the same bytes.",
    "best searched plan": "the best plan of the searcher, if a control won.",
    "merged, then rounded": (
        "the base model, fine-tuned unpacked; then its adapter was merged into the weights, and "
        "these were rounded to the largest format that fits the budget, without calibration."
    ),
    RANDOM: f"plans drawn at random, within {SAME_BYTES:.0%} of the winner's bytes.",
    SEARCHED: (
        "the plan that was best on fresh rows: `winner (...)` if it is a control, `given plan` if "
        "you gave it."
    ),
    "seeds": (
        "how many training seeds, and which; none is the trials'. Of several: means ± standard "
        "deviation."
    ),
    "bytes": (
        "packed tensors, scales, unquantized tensors and adapters. Mean bits are of the blocks' "
        "weights."
    ),
    TEST_ACCURACY: (
        "the share of right answers on held-out tasks, a mean over tasks; se is over questions."
    ),
    "answer loss": (
        "negative log-likelihood of the right answer, in nats per answer, a mean over tasks."
    ),
    "selection loss": (
        "in nats per token, on the fresh rows that chose the winner: half of the confirmation rows."
    ),
    "confirmation loss": (
        "in nats per token, on the other half of the confirmation rows, by which nothing was "
        "chosen."
    ),
    "perplexity": "the exponential of the mean loss per token on `evaluate.text`.",
    "interval": (
        "at 95 %, from the effects of questions or rows and of training seeds; with one seed it "
        "holds for this seed alone. Against random plans it is that of one more random plan. What "
        "the search minimized decides whether the winner is better or worse; other measures have "
        "no verdict, as one of several may exclude zero by chance."
    ),
}
STATES = {"done": "done", "recorded": "recorded before", "running": "begun"}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def cells(row: TableRow) -> dict[str, str]:
    """Format a row of the final table: heading -> cell."""
    accuracy = _figure(row.accuracy, row.accuracy_spread, 3)
    return {
        "row": row.title,
        "seeds": _seeds(row.seeds),
        "bytes": f"{row.measured_bytes / 1e6:.1f} MB",
        "mean bits": f"{row.mean_bits:.2f}",
        TEST_ACCURACY: accuracy + error_text(row.accuracy_stderr, 3),
        "test answer loss": _figure(row.answer_loss, row.answer_loss_spread),
        "perplexity": _figure(row.perplexity, row.perplexity_spread, 2),
        "cut": cut_title(row.cut),
        "from": row.origin,
        "confirmation loss": _figure(row.confirmation_loss, row.confirmation_loss_spread),
        "parameters": f"{row.num_parameters / 1e6:.1f} M",
        "peak memory": f"{row.peak_memory_bytes / 1e6:.0f} MB",
        "inference memory": (
            "-"
            if row.inference_memory_bytes is None
            else f"{row.inference_memory_bytes / 1e6:.0f} MB"
        ),
        "prefill tokens/s": speed_text(row.prefill_tokens_per_second),
        "decode tokens/s": speed_text(row.decode_tokens_per_second),
    }


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"1 ({seeds[0]})"
    return f"{len(seeds)} ({seeds[0]}-{seeds[-1]})"


def final_tables(results: Results) -> list[Table]:
    """Split the final table into parts that fit a terminal and paper.

    A caption names the metrics of the accuracy if tasks differ in them.
    """
    assert results.evaluate
    metrics = results.evaluate.metrics
    name = measures.accuracy_name(metrics)
    lines = [cells(row) for row in rows(results)]
    parts = []
    for caption, keys in FINAL:
        if name == measures.ACCURACY and TEST_ACCURACY in keys:
            caption += f"; {measures.accuracy_in_full(metrics)}"
        headings = tuple(f"test {name}" if key == TEST_ACCURACY else key for key in keys)
        body = [tuple(line[key] for key in keys) for line in lines]
        parts.append(Table(caption, headings, body).without_empty_columns())
    return parts


def _figure(value: float | None, spread: float | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def legend(results: Results) -> Table:
    """Build the legend, which explains the rows and figures of the final table."""
    terms = dict(TERMS)
    setting = results.inference
    if setting:
        terms["inference memory and tokens/s"] = (
            f"of one sequence on {setting.device}, with the adapter: {setting.prompt_tokens} "
            f"tokens read (prefill), {setting.new_tokens} written (decode); medians of turns, in "
            f"brackets minimum and maximum. The memory is the {setting.memory_counter}."
        )
    return Table("How to read the table", ("term", "meaning"), list(terms.items()))


def by_task(results: Results) -> Table:
    """Build the table of every model's accuracy by task, and of its losses over all tasks.

    The models before any fine-tune come first.
    """
    assert results.evaluate
    models: dict[str, list[FineTune]] = {}
    for record in (*results.evaluate.untuned, *results.fine_tunes):
        title = title_of(record.name, results.search)
        if record.seed is None:
            title += " (no fine-tune)"
        models.setdefault(title, []).append(record)
    tasks = [
        f"{task.task} {task.metric} ({counted(task.num_questions, 'question')})"
        for task in results.evaluate.rows[0].tasks
    ]
    body = []
    for title, records in models.items():
        scores_by_task = zip(*(record.tasks for record in records), strict=True)
        body.append((title, *map(_accuracy, scores_by_task), *_losses(records)))
    return Table(
        "Accuracy by held-out task (se: standard error over questions)",
        ("model", *tasks, "answer loss", "perplexity"),
        body,
    ).without_empty_columns()


def _accuracy(scores: Sequence[TaskScore]) -> str:
    """Format the mean accuracy over training seeds, with its standard error over questions."""
    value = statistics.fmean(score.value for score in scores)
    stderr = measures.over_tasks(measures.averaged([[score.correct] for score in scores])).stderr
    return f"{value:.3f}{error_text(stderr, 3)}"


def _losses(models: Sequence[FineTune]) -> tuple[str, str]:
    answers, texts = answer_losses(models), perplexities(models)
    return (
        f"{statistics.fmean(answers):.4f}" if answers else "-",
        f"{statistics.fmean(texts):.2f}" if texts else "-",
    )


def cuts(record: PruneRecord) -> Table:
    """Build the table of the cuts: what each removed, and its loss before any fine-tune."""
    base = record.cuts[UNPRUNED]
    last = list(record.cuts.values())[-1]
    body = [
        (
            cut_title(name),
            f"{cut.achieved_rate:.2%}",
            f"{cut.parameters_after / 1e6:.1f} M",
            _megabytes(cut.bytes_after),
            f"{cut.multiply_adds / base.multiply_adds:.1%}",
            ", ".join(map(str, cut.dropped_blocks)) or "-",
            f"{cut.loss:.4f}",
            f"{cut.seconds:.1f}" if cut.seconds else "-",
        )
        for name, cut in record.cuts.items()
    ]
    headings = (
        "cut",
        "removed",
        "parameters",
        "bytes",
        "multiply-adds",
        "blocks removed",
        "loss",
        "seconds",
    )
    caption = (
        f"Cuts (importance {last.importance}, selection {last.selection}, compensation "
        f"{last.compensation}); multiply-adds are a token's, against the base's; the loss is right "
        "after the cut, on rows for sensitivities"
    )
    return Table(caption, headings, body).without_empty_columns()


def trials(run: Snapshot) -> Table:
    """Build the table of all trials, with the score of each trial's last rung."""
    search = run.state.search
    best = run.best_trial
    body = []
    for trial in run.trials:
        last = trial.rungs[-1] if trial.rungs else None
        is_own = search is not None and trial.search == search.search
        body.append(
            (
                f"{trial.index}",
                trial.origin if is_own else f"{trial.origin}, another search",
                STATUSES[trial.status] + (f", {run.best_title}" if trial is best else ""),
                f"{trial.plan_bytes / 1e6:.2f}",
                cut_title(trial.cut),
                f"{trial.mean_bits:.2f}",
                f"{last.value(run.metric):.4f}" if last else "-",
                f"{last.step}" if last else "-",
                f"{trial.seconds:.0f}",
                plan_of(trial),
                trial.reason or "-",
            )
        )
    headings = (
        "trial",
        "from",
        "status",
        "MB",
        "cut",
        "mean bits",
        score_title(search) if search else "score",
        "step",
        "seconds",
        "plan",
        "reason",
    )
    used = by_size(tuple({name for trial in run.trials for name in trial.plan.values()}))
    letters = ", ".join(f"{format_of(name).letter} is {name}" for name in used)
    caption = (
        f"Every trial. A plan has one character per group, in model order: {letters}. The score is "
        "from the last rung."
    )
    return Table(caption, headings, body, is_on_page_only=True).without_empty_columns()


def fresh_scores(search: SearchRecord) -> Table:
    """Build the table of the finalists (winner, controls, best trials), as trials on fresh rows.

    Most of a loss's own standard error comes from the choice of rows; pairing the losses by row
    removes this part.
    """
    body = [_finalist(finalist, search) for finalist in finalists(search)]
    of_steps = f" of {counted(search.steps, 'step')}" if search.steps else ""
    caption = (
        "The winner, every control (what one would do instead) and the best trials: all as "
        f"trials{of_steps}, on the fresh rows that chose the winner; beside a loss the winner's "
        "difference from it, on the training seeds that both have, with intervals that hold all "
        "pairs of finalists together"
    )
    accuracy = f"selection {measures.accuracy_name(search.metrics)}"
    headings = (
        "row",
        "trial",
        "cut",
        "formats",
        "bytes",
        "selection loss",
        "mean over seeds",
        accuracy,
    )
    return Table(caption, headings, body).without_empty_columns()


def _finalist(finalist: Finalist, search: SearchRecord) -> tuple[str | ComparedCell, ...]:
    """Return the cells of one finalist."""
    size = _megabytes(finalist.plan_bytes)
    if finalist.plan_bytes > search.budget_bytes:
        size += ", exceeds the budget"
    elif not finalist.fits:
        size += ", computes more than the budget"
    num_seeds = len(finalist.fine_tunes)
    mean = finalist.mean
    accuracy = "-"
    if mean.accuracy is not None:
        accuracy = f"{mean.accuracy:.3f}{error_text(mean.accuracy_stderr, 3)}"
    loss = f"{finalist.as_trial.selection.loss:.4f}"
    return (
        finalist_title(finalist, search) + (", reused" if finalist.reused else ""),
        str(finalist.index),
        cut_title(finalist.cut),
        formats_text(finalist.plan),
        size,
        ComparedCell(loss, difference=difference_from(finalist, search)),
        "-" if num_seeds == 1 else f"{mean.loss:.4f} ({num_seeds} seeds)",
        accuracy,
    )


def rungs(search: SearchRecord) -> Table:
    """Build the table that shows how far the scores of early rungs can be trusted."""
    body = [
        (f"{rung.step}", f"{rung.num_trials}", _tau(rung.within), _tau(rung.across))
        for rung in search.rungs
    ]
    return Table(
        "Order of the finished trials at a rung against that at the last one: Kendall's tau, from "
        "-1 to 1",
        ("step", "trials", "within a cut", "between cuts"),
        body,
    ).without_empty_columns()


def _tau(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def stages(run: Snapshot) -> Table:
    """Build the table of the stages that were begun, with state and times, and the sum of all."""
    seconds = run.results.seconds
    # Trials of other searches count, too.
    gpu_seconds = run.results.gpu_seconds
    gpu_seconds["search"] = sum(trial.gpu_seconds for trial in run.trials)
    if run.results.search:
        gpu_seconds["search"] += run.results.search.confirmation_gpu_seconds

    body = []
    total = total_gpu = 0.0
    for name, stage in run.state.stages.items():
        if name not in Results.model_fields:
            continue
        taken = seconds.get(name, 0.0)
        taken_gpu = gpu_seconds.get(name, 0.0)
        body.append((name, STATES[stage.state], _seconds(taken), _seconds(taken_gpu)))
        total += taken
        total_gpu += taken_gpu
    body.append(("all stages", "-", _seconds(total), _seconds(total_gpu)))
    return Table(
        "Stages; GPU seconds are those of the jobs times the GPUs held for them, busy or not",
        ("stage", "state", "seconds", "GPU seconds"),
        body,
    )


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value else "-"
