"""The evaluate stage: measure accuracies on held-out tasks, memory and speed."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from qpruner.data.encoding import load_confirmation, save_encoded, text_windows
from qpruner.models.loading import load_tokenizer
from qpruner.pipeline.comparison_rows import (
    candidates_for,
    job_progress,
    run_jobs,
    untuned_candidates,
)
from qpruner.pipeline.context import Context
from qpruner.pipeline.finetune import setting_aside_damaged_adapter
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.records import (
    BASE,
    SEARCHED,
    EvalRecord,
    FinetuneRecord,
    Inference,
    InferenceSetting,
    RowScores,
    digest_of,
)
from qpruner.runs.storage import for_each, remove, write_json
from qpruner.training.table_rows import Candidate, evaluate_candidate
from qpruner.wording import counted, error_text


class Evaluate(Stage[EvalRecord]):
    """Score the base, pruned, quantized and fine-tuned models on tasks.

    The search did not use these tasks.
    """

    name = "evaluate"
    help = "Run up to the held-out evaluation."
    record = EvalRecord
    memory_keys = "`evaluate.batch_size` or `data.max_length`"

    @cached_property
    def jobs(self) -> list[Candidate]:
        """The base, pruned and quantized models without a fine-tune, and the fine-tuned winner."""
        [winner] = self.context.record(FinetuneRecord).candidates
        plan = PrecisionPlan.from_dict(winner.plan, winner.cut)
        untuned = untuned_candidates(self.context, plan)
        return [*untuned, *candidates_for(self.context, [(winner.name, plan, winner.seed)])]

    def inputs(self) -> tuple[Any, ...]:
        return (self.context.record(FinetuneRecord).digest, scores_digest(self.context))

    def detail(self) -> str:
        return f"{', '.join(self.config.evaluate.tasks)} for {counted(len(self.jobs), 'model')}"

    def run(self, scratch: Path) -> dict[str, Any]:
        context, jobs = self.context, self.jobs
        about, text = held_out_text(context, scratch / "text")
        inspection, settings = context.inspection, self.config.evaluate
        questions = inspection.rows.questions["evaluate"]
        metrics = inspection.rows.metrics["evaluate"]
        asked = (settings.tasks, settings.limit, settings.num_fewshot)
        with setting_aside_damaged_adapter(context.run_dir, self.name):
            scored = score_jobs(self, jobs, text)
            before = context.machines.gpu_time.seconds
            setting, taken = measure_in_turns(self, [job for job in jobs if job.seed is not None])
        rows = rows_of(jobs, scored, taken)
        return {
            "rows": rows,
            "text": about,
            "inference": setting,
            "tested": digest_of(questions, metrics, *asked, *context.task_files),
            "gpu_seconds": sum(row.gpu_seconds for row in rows)
            + context.machines.gpu_time.seconds
            - before,
        }

    def summary(self, record: EvalRecord) -> str:
        scores = {(row.name, row.seed is None): scores_line(row) for row in record.rows}
        return (
            f"{self.jobs[-1].label} {scores[SEARCHED, False]}; base as it is {scores[BASE, True]}"
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
    rows = load_confirmation(context.places.data, "judge")
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


def score_jobs(
    stage: Stage[Any], jobs: list[Candidate], text: Path | None
) -> dict[Path, RowScores]:
    """Score models on `evaluate.tasks` and `text`, unless recorded.

    Return the scores of all models by job folder.
    """
    context, digest = stage.context, scores_digest(stage.context)
    found: dict[Path, RowScores] = {}
    for job in jobs:
        file, place = job.folder / "scores.json", job.folder.parent
        record = stage.read_intact(file, RowScores, place, f"{job.label} is scored again")
        if record and record.digest == digest:
            found[job.folder] = record
    # files of an interrupted command
    for_each(remove, [job.progress for job in jobs if job.folder not in found])
    for job, (scores, seconds) in run_jobs(
        stage, evaluate_candidate, jobs, found, "answers", text=text
    ):
        held = seconds * context.machines.gpus_held()
        record = RowScores(digest=digest, name=job.name, seed=job.seed, gpu_seconds=held, **scores)
        write_json(job.folder / "scores.json", record)
        found[job.folder] = record
        stage.notify(f"{job.label}: {scores_line(record)}")
    return found


def scores_line(row: RowScores) -> str:
    """Format the score of a row on every task, such as `arc_easy acc_norm 0.650 (se 0.048)`."""
    return ", ".join(
        f"{each.task} {each.metric} {each.value:.3f}{error_text(each.stderr, 3)}"
        for each in row.scores
    )


def rows_of(
    jobs: Iterable[Candidate], scored: dict[Path, RowScores], taken: dict[Path, Inference]
) -> list[RowScores]:
    """List the scores of the jobs under their row names.

    Memory and speed are added where they were measured.
    """
    return [
        scored[job.folder].model_copy(update={"name": job.name, "inference": taken.get(job.folder)})
        for job in jobs
    ]


def measure_in_turns(
    stage: Stage[Any], jobs: Iterable[Candidate]
) -> tuple[InferenceSetting | None, dict[Path, Inference]]:
    """Measure memory and speed of models, alternating between them.

    Return the setting, and results by job folder.

    Nothing is measured if llama.cpp serves the winner: its speed there is what counts.
    """
    from qpruner.training.inference import InferenceJob, measure_inference

    context = stage.context
    if context.config.serve.uses_llama_cpp:
        return None, {}
    # Fine-tunes of a plan that differ only in the training seed are measured once.
    models: dict[tuple[Any, ...], list[Candidate]] = {}
    for job in sorted(jobs, key=lambda job: job.cut):
        models.setdefault((job.cut, *job.plan.items()), []).append(job)
    resources, _ = context.machines.task_resources(1)
    alone = tuple(same[0] for same in models.values())
    stage.notify(f"{counted(len(alone), 'model')} in turns: memory and tokens a second")
    progress = context.run_dir.candidates / "turns"
    task = InferenceJob(
        context.worker_config, alone, context.places.data, int(resources.get("cpu", 1)), progress
    )
    remove(progress)  # the file of an earlier command
    on_tick = job_progress(stage, [progress], 1, "memory and tokens a second")
    [(_, (setting, found))] = context.machines.run_tasks(
        measure_inference,
        [task],
        resources,
        1,
        own_process=True,
        on_tick=on_tick,
        on_held=context.machines.gpu_time.add,
    )
    return setting, {
        job.folder: taken
        for same, taken in zip(models.values(), found, strict=True)
        for job in same
    }
