"""The evaluate stage: measure accuracies on held-out tasks, memory and speed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qpruner.data.encoding import load_scored, save_encoded, text_windows
from qpruner.models.loading import load_tokenizer
from qpruner.pipeline.context import Context
from qpruner.pipeline.finetune import final_job
from qpruner.pipeline.stage import Stage
from qpruner.pipeline.tuning import (
    job_progress,
    score_all,
    setting_aside_damaged_folder,
    tasks_text,
)
from qpruner.plans.plan import UNPRUNED, PrecisionPlan, plan_of
from qpruner.runs.records import (
    BASE,
    CONFIRMATION,
    PRUNED,
    SEARCHED,
    EvalRecord,
    FineTune,
    FinetuneRecord,
    InferenceSetting,
    digest_of,
)
from qpruner.runs.storage import remove
from qpruner.training.jobs import FineTuneJob, Scoring
from qpruner.wording import counted


class Evaluate(Stage[EvalRecord]):
    """Score the base, pruned, quantized and fine-tuned models on tasks.

    The search did not use these tasks.
    """

    name = "evaluate"
    help = "Run up to the held-out evaluation."
    record = EvalRecord
    memory_keys = "`evaluate.batch_size` or `data.max_length`"

    @cached_property
    def jobs(self) -> list[FineTuneJob]:
        """The base, pruned and quantized models without a fine-tune, and the fine-tuned winner."""
        context = self.context
        winner = context.record(FinetuneRecord).winner
        plan = plan_of(winner)
        dense = unquantized(context, plan)
        jobs = [final_job(context, name, "unquantized", dense[name], None) for name in dense]
        jobs.append(final_job(context, SEARCHED, winner.origin, plan, None))
        tuned = final_job(context, SEARCHED, winner.origin, plan, winner.seed)
        return [*jobs, replace(tuned, record=winner)]

    def inputs(self) -> tuple[Any, ...]:
        return (self.context.record(FinetuneRecord).digest, scores_digest(self.context))

    def detail(self) -> str:
        return f"{', '.join(self.config.evaluate.tasks)} for {counted(len(self.jobs), 'model')}"

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        about, text = held_out_text(context, scratch / "text")
        inspection = context.inspection
        settings = self.config.evaluate
        scoring = held_out(context, text)
        jobs = [replace(job, scoring=scoring) for job in self.jobs]
        with setting_aside_damaged_folder(context.run_dir, self.name):
            rows = score_all(self, jobs, "answers")
            before = context.machines.gpu_time.seconds
            setting, rows = measure_in_turns(self, jobs, rows)
        tested = digest_of(
            inspection.rows.questions["evaluate"],
            inspection.rows.metrics["evaluate"],
            settings.tasks,
            settings.limit,
            settings.num_fewshot,
            *context.task_files,
        )
        scoring_seconds = sum(row.scoring_gpu_seconds for row in rows)
        return {
            "rows": rows,
            "text": about,
            "inference": setting,
            "tested": tested,
            "gpu_seconds": scoring_seconds + context.machines.gpu_time.seconds - before,
        }

    def summary(self, record: EvalRecord) -> str:
        [winner] = record.tuned
        base = next(row for row in record.untuned if row.name == BASE)
        ours = ", ".join(tasks_text(winner))
        return f"{self.jobs[-1].label} {ours}; base as it is {', '.join(tasks_text(base))}"


def unquantized(context: Context, winner: PrecisionPlan) -> dict[str, PrecisionPlan]:
    """Return the base model, and the pruned model that the winner quantizes, without formats."""
    dense = {BASE: context.shapes.layout_of(UNPRUNED).dense()}
    if winner.cut != UNPRUNED:
        dense[PRUNED] = context.shapes.layout_of(winner.cut).dense()
    return dense


def held_out(context: Context, text: Path | None) -> Scoring:
    """Return what the models of the final table are scored on, with the folder of a text."""
    settings = context.config.evaluate
    return Scoring(
        digest=scores_digest(context),
        tasks=settings.tasks,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        text=text,
    )


def held_out_text(context: Context, folder: Path) -> tuple[str | None, Path | None]:
    """Encode text for perplexity into a folder.

    Return a description and the folder, or None twice without a text.

    Without `evaluate.text`, use the half of `data.confirmation` that judges the winner, unless a
    row has choices.
    """
    examples, length = context.inspection.rows.examples, context.config.data.max_length
    if "text" in examples:
        tokenizer = load_tokenizer(str(context.places.checkpoint_of(context.shapes.reference.cut)))
        rows = text_windows((row.response for row in examples["text"]), tokenizer, length)
        save_encoded(rows, folder)
        return f"`evaluate.text` in {len(rows)} windows of {length} tokens", folder
    if any(row.format == "multiple_choice" for row in examples["confirmation"]):
        return None, None
    rows = load_scored(context.places.data, CONFIRMATION)
    save_encoded(rows, folder)
    part = "responses" if context.config.data.response_only else "whole rows"
    if all(row.format == "text" for row in examples["confirmation"]):
        part = "text"
    return f"the {part} of the {len(rows)} confirmation rows that chose nothing", folder


def scores_digest(context: Context) -> str:
    """Compute the digest of everything that models are scored on.

    That is the tasks, their metrics, texts and settings.
    """
    texts = [row.response for row in context.inspection.rows.examples.get("text", ())]
    metrics = context.inspection.rows.metrics["evaluate"]
    return digest_of(
        context.config.evaluate,
        context.task_digest("evaluate"),
        metrics,
        texts,
        context.config.data.max_length,
    )


def measure_in_turns(
    stage: Stage[Any], jobs: Sequence[FineTuneJob], rows: Sequence[FineTune]
) -> tuple[InferenceSetting | None, list[FineTune]]:
    """Measure memory and speed of the fine-tuned models, alternating between them.

    Nothing is measured if llama.cpp serves the winner: its speed there is what counts.

    Returns:
        The setting, and the rows with what was measured; they are those of the jobs.
    """
    from qpruner.training.inference import InferenceJob, measure_inference

    context = stage.context
    if context.config.serve.uses_llama_cpp:
        return None, list(rows)
    # Fine-tunes of a plan that differ only in the training seed are measured once.
    models: dict[tuple[bool, PrecisionPlan], FineTuneJob] = {}
    for job in sorted(jobs, key=lambda job: job.record.cut):
        if job.record.seed is not None:
            models.setdefault(_model_of(job.record), job)

    resources, _ = context.machines.task_resources(1)
    stage.notify(f"{counted(len(models), 'model')} in turns: memory and tokens a second")
    progress = context.run_dir.candidates / "turns"
    threads = int(resources.get("cpu", 1))
    task = InferenceJob(tuple(models.values()), context.places.data, threads, progress)
    remove(progress)  # the file of an earlier command
    on_tick = job_progress(stage, [progress], 1, "memory and tokens a second")
    [(_, (setting, figures))] = context.machines.run_tasks(
        measure_inference,
        [task],
        resources,
        1,
        own_process=True,
        on_tick=on_tick,
        on_held=context.machines.gpu_time.add,
    )
    of_model = dict(zip(models, figures, strict=True))
    measured = []
    for row in rows:
        taken = None if row.seed is None else of_model[_model_of(row)]
        measured.append(row.model_copy(update={"inference": taken}))
    return setting, measured


def _model_of(record: FineTune) -> tuple[bool, PrecisionPlan]:
    """Return what memory and speed depend on: the plan, and whether it has no adapter beside it."""
    return record.is_merged, plan_of(record)
