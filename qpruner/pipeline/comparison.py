"""The comparison stage: fine-tune and score baselines in the same way as the winning plan."""

from functools import cached_property
from pathlib import Path
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.pipeline.comparison_rows import distinct, job_keys, jobs_of, table_rows
from qpruner.pipeline.evaluate import measure_in_turns, rows_of, score_jobs
from qpruner.pipeline.finetune import finetune_jobs, have_rows, setting_aside_damaged_adapter
from qpruner.pipeline.report import report_unfinished
from qpruner.pipeline.stage import Stage
from qpruner.runs.records import ComparisonRecord, EvalRecord, FinetuneRecord
from qpruner.training.table_rows import Candidate
from qpruner.wording import counted


class Comparison(Stage[ComparisonRecord]):
    """Fine-tune and score the models of the final table, which are the winner and baselines.

    The records of the winner are reused.
    """

    name = "comparison"
    record = ComparisonRecord
    keeps_files = False
    trains = True

    @classmethod
    def is_wanted(cls, config: RunConfig) -> bool:
        return config.finetune.compare

    @cached_property
    def jobs(self) -> list[Candidate]:
        """One job for each fine-tune of each row of the table."""
        return jobs_of(self.context, table_rows(self.context))

    def inputs(self) -> tuple[Any, ...]:
        return (self.context.record(EvalRecord).digest, job_keys(self.jobs))

    def begin(self) -> None:
        if not have_rows(self.jobs):
            self.context.forget(self.name)

    def detail(self) -> str:
        return (
            f"{counted(len(distinct(self.jobs)) - 1, 'fine-tune')} beside the winner's, "
            "and their scores"
        )

    def run(self, scratch: Path) -> dict[str, Any]:
        context, jobs, models = self.context, self.jobs, distinct(self.jobs)
        self.notify(f"the winner is done: {report_unfinished(context.run_dir)}")
        text = (
            context.run_dir.stage("evaluate") / "text" if context.record(EvalRecord).text else None
        )
        with setting_aside_damaged_adapter(context.run_dir, self.name):
            tuned = finetune_jobs(self, jobs)
            scored = score_jobs(self, models, text)
            before = context.machines.gpu_time.seconds
            setting, taken = measure_in_turns(self, models)
        own = {each.digest for each in context.record(FinetuneRecord).candidates}
        held = {each.digest: each.gpu_seconds for each in tuned if each.digest not in own}
        scoring = sum(
            scored[job.folder].gpu_seconds for job in models if job.folder.name not in own
        )
        return {
            "candidates": tuned,
            "rows": rows_of(jobs, scored, taken),
            "inference": setting,
            "gpu_seconds": sum(held.values())
            + scoring
            + context.machines.gpu_time.seconds
            - before,
        }

    def summary(self, record: ComparisonRecord) -> str:
        titles, first = (
            {job.name: job.title for job in self.jobs},
            min(each.seed for each in record.candidates),
        )
        losses = [
            f"{titles[row.name]} {row.confirmation_loss:.4f}"
            for row in record.candidates
            if row.seed == first
        ]
        return f"training seed {first}: confirmation loss {', '.join(losses)}"

    def disk_bytes(self) -> int:
        return 6 * self.context.inspection.shapes.checkpoint_bytes
