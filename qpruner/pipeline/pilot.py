"""The pilot stage: choose the learning rate before the search, for `learning_rate: auto`.

A plan that has to be beaten gets the fine-tune of a trial at three learning rates. The one with the
lowest loss on the validation rows is that of all trials and of the final fine-tunes. Each training
method has a pilot of its own, because their rates have different units: those of an adapter are
absolute, those of scales relative.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.errors import StageError
from qpruner.pipeline.search import Search
from qpruner.pipeline.stage import Stage
from qpruner.pipeline.tuning import job_keys, make_job, tune_all
from qpruner.plans.plan import PrecisionPlan
from qpruner.quantization.formats import Method, trained_by
from qpruner.runs.records import VALIDATION, FineTune, PilotRecord
from qpruner.training.jobs import FineTuneJob, Scoring
from qpruner.wording import counted

RATES: dict[Method, tuple[float, ...]] = {
    "adapter": (3e-4, 1e-3, 3e-3),
    "scales": (1e-3, 2e-3, 4e-3),
}


class Pilot(Stage[PilotRecord]):
    """Choose the learning rate of each training method."""

    name = "pilot"
    record = PilotRecord
    keeps_files = False
    trains = True

    @classmethod
    def is_wanted(cls, config: RunConfig) -> bool:
        return config.training.learning_rate == "auto"

    @cached_property
    def jobs(self) -> list[FineTuneJob]:
        """One fine-tune for each method and rate."""
        return [
            self._job(method, plan, rate)
            for method, plan in self._plans()
            for rate in RATES[method]
        ]

    def _plans(self) -> Iterator[tuple[Method, PrecisionPlan]]:
        """Yield each method that the run allows with the plan on which its rates are tried."""
        search = Search(self.context)
        plans = [search.given] if search.given else [plan for _, plan in search.controls]
        by_method: dict[Method, PrecisionPlan] = {}
        for plan in plans:
            by_method.setdefault(trained_by(self.config.training.method, plan.formats), plan)
        if self._trains_unpacked:
            by_method.setdefault("adapter", self.context.shapes.reference.dense())
        yield from by_method.items()

    @property
    def _trains_unpacked(self) -> bool:
        """Whether the run may fine-tune a model in which nothing is packed."""
        layout = self.context.shapes.reference
        largest = trained_by(self.config.training.method, layout.largest().formats)
        return self.config.finetune.compare or largest == "adapter"

    def _job(self, method: Method, plan: PrecisionPlan, rate: float) -> FineTuneJob:
        config = self.context.worker_config
        changes = {
            "finetune": config.trial_finetune,
            "training": config.training.model_copy(update={"learning_rate": rate}),
        }
        name = f"{method} at {rate:g}"
        made = make_job(
            self.context,
            plan,
            config.seed,
            Scoring(rows=VALIDATION),
            name=name,
            title=f"pilot, {name}",
            origin="pilot",
            config=config.model_copy(update=changes),
            tunes_rounding=False,
        )
        return replace(made, survives_divergence=True)

    def inputs(self) -> tuple[Any, ...]:
        return (job_keys(self.jobs),)

    def detail(self) -> str:
        methods = ", ".join(dict.fromkeys(job.record.method for job in self.jobs))
        return (
            f"{counted(len(self.jobs), 'fine-tune')} of "
            f"{counted(self.config.search.steps, 'step')} at several learning rates ({methods})"
        )

    def run(self, scratch: Path) -> dict[str, Any]:
        records = tune_all(self, self.jobs)
        best: dict[Method, FineTune] = {}
        for record in records:
            present = best.setdefault(record.method, record)
            best[record.method] = min(present, record, key=_loss)
        for method, record in best.items():
            if not record.trained_sha256:
                raise StageError(
                    self.name,
                    f"the training of {method} diverged at each of the learning rates "
                    f"{', '.join(f'{rate:g}' for rate in RATES[method])}",
                    "set a lower one as `training.learning_rate`",
                )
        return {
            "rates": {method: record.learning_rate for method, record in best.items()},
            "fine_tunes": records,
        }

    def summary(self, record: PilotRecord) -> str:
        return record.text

    def disk_bytes(self) -> int:
        if not self.context.run_dir.storage.fills_this_disk:
            return 0
        return num_fine_tunes(self.config) * self.context.inspection.shapes.checkpoint_bytes


def num_fine_tunes(config: RunConfig) -> int:
    """Count the fine-tunes of the pilot, at most."""
    methods = {config.training.method, "adapter"}
    return sum(len(rates) for method, rates in RATES.items() if method in methods)


def _loss(record: FineTune) -> float:
    return record.losses[VALIDATION].mean
