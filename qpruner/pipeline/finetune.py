"""The finetune stage: fine-tune the winning plan anew.

It writes the folder `final`.
"""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

from qpruner.cluster.slots import worker_resources
from qpruner.config.schema import RunConfig
from qpruner.errors import UserError
from qpruner.pipeline.context import Context
from qpruner.pipeline.final_model import write_final
from qpruner.pipeline.stage import Stage
from qpruner.pipeline.tuning import (
    are_recorded,
    job_keys,
    make_job,
    setting_aside_damaged_folder,
    tune_all,
)
from qpruner.plans.plan import PrecisionPlan, plan_of
from qpruner.runs import storage
from qpruner.runs.records import CONFIRMATION, SEARCHED, FinetuneRecord, SearchRecord
from qpruner.search.roles import title_of
from qpruner.training.jobs import FineTuneJob, Scoring
from qpruner.wording import counted


class Finetune(Stage[FinetuneRecord]):
    """Fine-tune the winning plan for `finetune.steps` or epochs.

    The result is written to the folder `final`.
    """

    name = "finetune"
    help = "Run up to the final fine-tune."
    record = FinetuneRecord
    keeps_files = False
    trains = True

    @cached_property
    def job(self) -> FineTuneJob:
        """The job of the winner, with the first training seed."""
        search = self.context.record(SearchRecord)
        return final_job(
            self.context,
            SEARCHED,
            winner_origin(search),
            plan_of(search.winner),
            first_seed(self.config),
        )

    def inputs(self) -> tuple[Any, ...]:
        return (self.context.record(SearchRecord).digest, job_keys([self.job]))

    def check(self) -> None:
        context = self.context
        wanted = self.config.finetune.num_workers
        if context.assumed or wanted == 1:
            return
        slots = context.machines.known_slots
        resources = worker_resources(context.machines.trial_resources, wanted)
        fits = slots.at_most(resources)
        if fits < wanted:
            raise UserError(
                f"`finetune.num_workers`: {wanted} workers with {resources} each must run at once, "
                f"but only {fits} fit on {counted(len(slots.nodes), 'machine')}, the largest with "
                f"{slots.largest}: use fewer workers, or add machines"
            )

    def begin(self) -> None:
        final = self.context.run_dir.root / "final"
        if not (
            are_recorded([self.job])
            and final in storage.published_folders(final.parent)
            and self.is_complete(final)
        ):
            self.context.forget(self.name)

    def detail(self) -> str:
        settings = self.config.finetune
        length = (
            counted(settings.steps, "step")
            if settings.steps
            else counted(settings.epochs or 0.0, "epoch")
        )
        return (
            f"the winner, {length}, with another training seed, and so another loss, "
            "than in its trial"
        )

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        num_workers = self.config.finetune.num_workers
        before = context.machines.gpu_time.seconds
        [winner] = tune_all(self, [self.job], num_workers, own_process=True)
        context.forget(self.name)  # because the final folder is about to be overwritten
        write = partial(write_final, self.job, context.run_dir.root / "final")
        with setting_aside_damaged_folder(context.run_dir, self.name):
            context.machines.executor.run(write, context.emit)
        # An earlier command may have run the fine-tune.
        held = winner.gpu_seconds + context.machines.gpu_time.seconds - before
        return {"winner": winner, "gpu_seconds": held}

    def summary(self, record: FinetuneRecord) -> str:
        winner = record.winner
        return f"confirmation loss {winner.confirmation.mean:.4f}, training seed {winner.seed}"

    def disk_bytes(self) -> int:
        shapes = self.context.inspection.shapes
        return 2 * shapes.checkpoint_bytes + shapes.tuned_bytes


def winner_origin(search: SearchRecord) -> str:
    """Say where the winning plan comes from."""
    return f"{search.winner.origin}, trial {search.best_index}"


def first_seed(config: RunConfig) -> int:
    """Return the first training seed of the final fine-tunes.

    It differs from the seed of the trials: with the data order of its trial, the winner would look
    too good.
    """
    return config.seed + 1


def final_job(
    context: Context, name: str, origin: str, plan: PrecisionPlan, seed: int | None
) -> FineTuneJob:
    """Make the job of a model of the final table, which is scored on the judging rows."""
    title = title_of(name, context.record(SearchRecord))
    scoring = Scoring(rows=CONFIRMATION)
    return make_job(context, plan, seed, scoring, name=name, title=title, origin=origin)
