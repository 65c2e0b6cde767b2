"""The comparison stage: fine-tune and score baselines in the same way as the winning plan."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import controls, may_merge, merged_plan
from qpruner.pipeline.evaluate import held_out, measure_in_turns, unquantized
from qpruner.pipeline.finetune import final_job, first_seed, winner_origin
from qpruner.pipeline.preflight import most_controls
from qpruner.pipeline.report import report_unfinished
from qpruner.pipeline.stage import Stage
from qpruner.pipeline.tuning import (
    are_recorded,
    distinct,
    job_keys,
    score_all,
    setting_aside_damaged_folder,
    tune_all,
)
from qpruner.plans.plan import PrecisionPlan, plan_of
from qpruner.quantization.formats import format_of
from qpruner.runs.records import (
    BASE,
    BEST_SEARCHED,
    MERGED,
    PAPER,
    RANDOM,
    SEARCHED,
    ComparisonRecord,
    EvalRecord,
    FinetuneRecord,
    SearchRecord,
    digest_of,
)
from qpruner.search.choice import random_plans
from qpruner.search.roles import control_title, is_beaten
from qpruner.training.jobs import FineTuneJob
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
    def jobs(self) -> list[FineTuneJob]:
        """One job for each fine-tune of each row of the table."""
        return final_jobs(self.context)

    def inputs(self) -> tuple[Any, ...]:
        return (self.context.record(EvalRecord).digest, job_keys(self.jobs))

    def begin(self) -> None:
        if not are_recorded(self.jobs):
            self.context.forget(self.name)

    def detail(self) -> str:
        return (
            f"{counted(len(distinct(self.jobs)) - 1, 'fine-tune')} beside the winner's, "
            "and their scores"
        )

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        self.notify(f"the winner is done: {report_unfinished(context.run_dir)}")
        if not any(job.merges for job in self.jobs):
            self.notify(
                "the table has no merged model: no single format of llama.cpp on offer makes the "
                "unpruned model fit the budget"
            )
        text = None
        if context.record(EvalRecord).text:
            text = context.run_dir.stage("evaluate") / "text"
        scoring = held_out(context, text)
        before = context.machines.gpu_time.seconds
        with setting_aside_damaged_folder(context.run_dir, self.name):
            tuned = tune_all(self, self.jobs, self.config.finetune.num_workers, own_process=True)
            jobs = [
                replace(job, record=record, scoring=scoring)
                for job, record in zip(self.jobs, tuned, strict=True)
            ]
            rows = score_all(self, jobs, "answers")
            setting, rows = measure_in_turns(self, jobs, rows)
        winner = context.record(FinetuneRecord).winner.digest
        held = {row.digest: row.total_gpu_seconds for row in rows if row.digest != winner}
        return {
            "rows": rows,
            "inference": setting,
            "gpu_seconds": sum(held.values()) + context.machines.gpu_time.seconds - before,
        }

    def summary(self, record: ComparisonRecord) -> str:
        titles = {job.record.name: job.title for job in self.jobs}
        first = first_seed(self.config)
        losses = [
            f"{titles[row.name]} {row.confirmation.mean:.4f}"
            for row in record.rows
            if row.seed == first
        ]
        return f"training seed {first}: confirmation loss {', '.join(losses)}"

    def disk_bytes(self) -> int:
        shapes = self.context.inspection.shapes
        size = 6 * shapes.checkpoint_bytes + num_rounded(self.config) * shapes.tuned_bytes
        if may_merge(self.config):
            unpacked = shapes.base.plan_bytes(shapes.base.dense())
            size += self.config.finetune.seeds * (unpacked + shapes.budget_bytes)
        return size


def num_rounded(config: RunConfig) -> int:
    """Count the plans, beside the winner's, whose codes may be tuned for their fine-tunes."""
    return most_controls(config) + (config.finetune.random_plans if config.has_choice else 0)


def final_jobs(context: Context) -> list[FineTuneJob]:
    """Make the jobs of the final table, in the order of its rows.

    Controls that the winner beat as trials are left out, but its rival and the paper's flow stay.
    If a control won, the rival is the best searched plan. Random plans have about the winner's
    bytes, and its cut. The winner, its rival, the random plans and the merged model get
    `finetune.seeds` training seeds each, and so does the base that is merged; the other rows get
    one.
    """
    config = context.config
    search = context.record(SearchRecord)
    winner = plan_of(search.winner)
    first = first_seed(config)
    seeds = range(first, first + config.finetune.seeds)
    rival = search.rival_as_trial
    beaten = [plan_of(finalist) for finalist in search.finalists if is_beaten(finalist, search)]
    jobs: list[FineTuneJob] = []

    def add(name: str, origin: str, plans: Iterable[PrecisionPlan], seeds: Iterable[int]) -> None:
        plans = list(plans)
        for seed in seeds:
            jobs.extend(final_job(context, name, origin, plan, seed) for plan in plans)

    dense, merged = unquantized(context, winner), merged_plan(context)
    for name, plan in dense.items():
        add(name, "unquantized", [plan], seeds if name == BASE and merged else seeds[:1])
    if merged:
        jobs += [merged_job(context, job, merged) for job in jobs if job.record.name == BASE]
    for name, plan in controls(context):
        is_rival = rival is not None and plan_of(rival) == plan
        is_needed = is_rival or name == PAPER or plan not in beaten
        if is_needed and plan not in dense.values():
            add(name, name, [plan], seeds if is_rival else seeds[:1])
    if rival is not None and not rival.control:
        add(BEST_SEARCHED, f"{rival.origin}, trial {rival.index}", [plan_of(rival)], seeds)

    space = context.shapes.space_of(winner.cut)
    if winner in space:
        drawn = random_plans(space, winner, config.finetune.random_plans, config.seed)
        add(RANDOM, counted(len(drawn), "random plan"), drawn, seeds)
    add(SEARCHED, winner_origin(search), [winner], seeds)
    return jobs


def merged_job(context: Context, unpacked: FineTuneJob, plan: PrecisionPlan) -> FineTuneJob:
    """Make the job that merges the adapter of a fine-tune of the base model, and rounds it."""
    layout = replace(context.shapes.base, method="scales")
    packed = [name for name in dict.fromkeys(plan.formats) if format_of(name).is_packed]
    digest = digest_of(MERGED, unpacked.record.digest, plan.as_dict())
    record = unpacked.record.model_copy(
        update={
            "digest": digest,
            "name": MERGED,
            "origin": f"rounded to {', '.join(packed)} as llama-quantize does",
            "plan": plan.as_dict(),
            "plan_bytes": layout.plan_bytes(plan),
            "mean_bits": layout.mean_bits(plan),
            "is_merged": True,
        }
    )
    folder = context.run_dir.candidates / digest
    return replace(
        unpacked,
        record=record,
        title=control_title(MERGED),
        folder=folder,
        trained=folder / "trained",
        merges=unpacked,
    )
