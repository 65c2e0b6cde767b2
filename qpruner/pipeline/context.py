"""What the stages of a run share: configuration, records so far, folders, cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from qpruner.cluster.connect import Cluster, connect, disconnect
from qpruner.cluster.executor import ClusterExecutor, GpuTime, LocalExecutor, ModelExecutor
from qpruner.cluster.node_check import packed_check, versions
from qpruner.cluster.slots import Slots, local_slots, worker_resources
from qpruner.config.schema import RunConfig
from qpruner.models.loading import absolute_source, checkpoint_config
from qpruner.pipeline import preflight
from qpruner.pipeline.preflight_rows import include_path
from qpruner.plans.file import check_affordable, read_plan
from qpruner.plans.plan import Layout, PlanSpace, PrecisionPlan
from qpruner.runs.events import Emit
from qpruner.runs.lock import NAME as LOCK
from qpruner.runs.lock import lock_lost
from qpruner.runs.records import Record, Results, digest_of
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import display_name, fetch, fetch_file, file_digest
from qpruner.training.trackers import Trackers, check_trackers

CONFIG_FILE = "config.json"
Job = TypeVar("Job")
RecordType = TypeVar("RecordType", bound=Record)
Result = TypeVar("Result")


@dataclass
class Context:
    """One run at work: what is known before the first stage, and the records of the stages so far."""

    config: RunConfig
    run_dir: RunDir
    emit: Emit
    address: str | None  # of a Ray cluster to join
    inspection: preflight.Inspection
    writes: bool = True
    gpu_time: GpuTime = field(default_factory=GpuTime)  # of work outside the trials
    assumed: Slots | None = None  # to plan with instead of those of this machine
    holds_run: Callable[[], bool] = lambda: True  # False once another driver has the run
    records: Results = field(default_factory=Results)

    def record(self, kind: type[RecordType]) -> RecordType:
        """Return the record of an earlier stage, by its class."""
        return next(record for _, record in self.records if isinstance(record, kind))

    def add_record(self, stage: str, record: Record) -> None:
        """Keep a stage's record for the stages after it."""
        self.records = self.records.model_copy(update={stage: record})

    @property
    def data(self) -> Path:
        """The encoded rows, one folder a split; read through `load_encoded`."""
        return self.run_dir.stage("prepare") / "data"

    @property
    def checkpoint(self) -> Path:
        """The pruned model and its tokenizer, fetched to this machine."""
        return fetch(self.run_dir.stage("prune"))

    @property
    def bank(self) -> Path:
        """The bank's files; read through `read_plan`."""
        return self.run_dir.stage("bank")

    @cached_property
    def worker_config(self) -> RunConfig:
        """The configuration with absolute paths: workers have another current folder."""
        model, calibration, evaluate = self.config.model, self.config.calibration, self.config.evaluate
        ids = calibration.token_ids
        return self.config.model_copy(
            update={
                "model": model.model_copy(update={"source": absolute_source(model.source)}),
                "calibration": calibration.model_copy(update={"token_ids": ids and absolute_source(ids)}),
                "evaluate": evaluate.model_copy(update={"include_path": include_path(self.config)}),
            }
        )

    @cached_property
    def task_digest(self) -> str:
        """Digest of the questions and files of the tasks."""
        questions = self.inspection.questions
        return digest_of({name: questions[name] for name in ("search", "evaluate")}, *self.task_files)

    @cached_property
    def task_files(self) -> list[str]:
        """Digests of the files in `evaluate.include_path`."""
        folder = include_path(self.config)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file()) if folder else []
        return [file_digest(path) for path in files if path.suffix != ".pyc"]

    @cached_property
    def pruned_config(self) -> Any:
        """The transformers config of the pruned model, read without its weights."""
        with tempfile.TemporaryDirectory() as here:
            fetch_file(self.run_dir.stage("prune") / CONFIG_FILE, Path(here) / CONFIG_FILE)
            return checkpoint_config(Path(here))

    @cached_property
    def layout(self) -> Layout:
        """Groups and sizes of the pruned model as it is."""
        return preflight.layout_for(self.config, self.pruned_config)

    @property
    def checkpoint_bytes(self) -> int:
        """About the bytes of a checkpoint of a fine-tune: the adapter, and Adam's two moments of it."""
        return 3 * self.inspection.pruned.adapter_bytes

    @cached_property
    def space(self) -> PlanSpace:
        """The plans inside the budget."""
        quantize = self.config.quantize
        budget = preflight.budget_bytes(quantize, self.layout, self.config.search.pareto)
        return PlanSpace.of(self.layout, quantize.bits, budget)

    @cached_property
    def plan_in_file(self) -> PrecisionPlan | None:
        """The plan in the file that `search.plan` names; refused if it is none for this model, or over the budget."""
        file = self.config.search.plan_file
        if file is None:
            return None
        plan = read_plan(file, self.space.groups, self.space.levels)
        check_affordable(file, self.space.plan_bytes(plan), self.space.budget_bytes)
        return plan

    @cached_property
    def trackers(self) -> Trackers | None:
        """The trackers beside TensorBoard, or None."""
        names, root = self.config.trackers, self.run_dir.root
        if not names:
            return None
        return Trackers(names, display_name(root).rstrip("/").rpartition("/")[2], root, check_trackers(names))

    @cached_property
    def cluster(self) -> Cluster:
        """The cluster that was given, that of `RAY_ADDRESS`, or one on this machine; connects on first use."""
        return connect(self.address)

    @property
    def slots(self) -> Slots:
        """The cluster's slots as they are now."""
        return self.cluster.slots()

    @property
    def known_slots(self) -> Slots:
        """The slots, found without starting Ray."""
        return self.slots if self.address else self.assumed or local_slots()

    @cached_property
    def executor(self) -> ModelExecutor:
        """Where the work on one model is done: on the cluster that was given, so that its head needs no GPU.

        It holds a GPU, all of its machine where the dense model is spread; every core where trials run on CPUs.
        """
        is_spread = self.config.model.device_map == "auto"
        if not self.address:
            present = local_slots().gpus
            return LocalExecutor(present if is_spread else min(present, 1.0), self.gpu_time)
        resources, largest = self.trial_resources, self.slots.largest
        if resources.get("gpu"):
            resources = resources | {"gpu": largest.gpus if is_spread else max(1.0, resources["gpu"])}
        else:
            resources = {"cpu": float(int(largest.cpus))}
        return ClusterExecutor(resources, self.gpu_time, self.check_node)

    @cached_property
    def check_node(self) -> bytes:
        """A pickled check that each process on the cluster calls first: its node may have joined late."""
        if not self.address:
            return packed_check({}, None)
        return packed_check(versions(), self.run_dir if self.writes else None)

    @cached_property
    def trial_resources(self) -> dict[str, float]:
        """What Ray reserves for one trial; it stays the same when machines leave."""
        asked, slots = self.config.search.resources_per_trial, self.known_slots
        resources = slots.resources_per_trial(asked.model_dump() if asked else None)
        slots.concurrent(resources, None)
        return resources

    def task_resources(self, num_tasks: int, num_workers: int = 1) -> tuple[dict[str, float], int]:
        """Return the resources of one of several equal tasks, or of each of its workers, and how many run at once.

        On CPUs the tasks share the cores.
        """
        resources, slots = worker_resources(self.trial_resources, num_workers), self.slots
        limit = max(self.config.search.max_concurrent or num_tasks * num_workers, num_workers)
        room = max(slots.fits(resources), min(slots.at_most(resources), limit))
        # Where every machine is gone for a while, one task waits for another.
        concurrent = min(max(room // num_workers, 1), num_tasks)
        if concurrent and not resources.get("gpu"):
            resources = {"cpu": slots.cores_each(concurrent * num_workers)}
        return resources, concurrent

    def run_tasks(
        self,
        function: Callable[[Job], Result],
        jobs: Sequence[Job],
        resources: dict[str, float],
        concurrent: int,
        fresh: bool = False,
        **more: Any,
    ) -> Iterator[tuple[int, Result]]:
        """Run jobs by `cluster.tasks.run_tasks` on nodes that pass the run's check."""
        from qpruner.cluster.tasks import run_tasks

        return run_tasks(function, jobs, resources, concurrent, fresh, self.check_node, **more)

    def check_ours(self, stage: str) -> None:
        """Check the lock before a record is written or removed: this process may have slept."""
        if not self.holds_run():
            raise lock_lost(stage, f"{display_name(self.run_dir.root / LOCK)} is another's, or gone")

    def forget(self, stage: str) -> None:
        """Remove the record of a stage."""
        self.check_ours(stage)
        self.run_dir.forget(stage)

    def close(self) -> None:
        """Give back the model's memory, and leave the cluster unless it was joined before."""
        if "executor" in self.__dict__:
            self.executor.close()
        if "cluster" in self.__dict__ and not self.cluster.was_joined:
            disconnect()
