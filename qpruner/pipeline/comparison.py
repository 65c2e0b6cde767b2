"""The comparison: what the winner stands beside gets the same fine-tune and the same tasks, once the winner is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qpruner.pipeline.context import Context
from qpruner.pipeline.jobs import (
    RowJob,
    distinct,
    finetune_jobs,
    forget_without_rows,
    jobs_of,
    measure_in_turns,
    row_set_aside_if_damaged,
    score_jobs,
    told_jobs,
)
from qpruner.pipeline.report import report_unfinished
from qpruner.pipeline.rows import table_rows
from qpruner.pipeline.stage import Stage, run_stage
from qpruner.runs.events import Message
from qpruner.runs.records import ComparisonRecord, EvalRecord, Results, SearchRecord, SensitivityRecord
from qpruner.wording import counted


def compare(context: Context, results: Results) -> ComparisonRecord:
    """Every row of the final table under its training seeds; of the winner nothing is trained or scored again."""
    searched, measured, evaluated = results.search, results.sensitivity, results.evaluate
    assert searched and measured and evaluated and results.finetune, "the winner comes first"
    jobs = comparison_jobs(context, searched, measured)
    own = {each.digest for each in results.finetune.candidates}
    text = context.run_dir.stage("evaluate") / "text" if evaluated.text else None
    forget_without_rows(context, "comparison", jobs)

    def work(scratch: Path) -> dict[str, Any]:
        # Whatever becomes of the comparison: the winner's report is there.
        context.emit(Message("comparison", f"the winner is done: {report_unfinished(context.run_dir)}"))
        models = distinct(jobs)
        with row_set_aside_if_damaged(context.run_dir, "comparison"):
            tuned = finetune_jobs(context, "comparison", jobs)
            scored = score_jobs(context, "comparison", models, text)
            before = context.gpu_time.seconds
            setting, taken = measure_in_turns(context, "comparison", models)
        rows = [
            scored[job.folder].model_copy(update={"name": row.name, "inference": taken[job.folder]})
            for row, job in jobs
        ]
        held = {each.digest: each.gpu_seconds for each in tuned if each.digest not in own}
        scoring = sum(scored[job.folder].gpu_seconds for job in models if job.folder.name not in own)
        return {
            "candidates": tuned,
            "rows": rows,
            "inference": setting,
            "gpu_seconds": sum(held.values()) + scoring + context.gpu_time.seconds - before,
        }

    def figures(record: ComparisonRecord) -> str:
        titles, first = {job.name: job.title for _, job in jobs}, min(each.seed for each in record.candidates)
        losses = [(titles[each.name], each.confirmation_loss) for each in record.candidates if each.seed == first]
        told = ", ".join(f"{title} {loss:.4f}" for title, loss in losses)
        return f"training seed {first}: confirmation loss {told}"

    return run_stage(context, comparison_stage(evaluated, jobs), ComparisonRecord, work, figures)


def comparison_jobs(context: Context, searched: SearchRecord, measured: SensitivityRecord) -> list[RowJob]:
    """Every row of the table under every training seed."""
    return jobs_of(context, table_rows(context, searched, measured))


def comparison_stage(evaluated: EvalRecord, jobs: list[RowJob]) -> Stage:
    """What `comparison` depends on."""
    others = len(distinct(jobs)) - 1
    detail = f"{counted(others, 'fine-tune')} beside the winner's, and their scores"
    return Stage("comparison", detail, (evaluated.digest, told_jobs(jobs)))
