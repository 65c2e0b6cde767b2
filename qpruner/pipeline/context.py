"""The state that all stages of a run share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qpruner.cluster.connect import Cluster, connect, disconnect
from qpruner.cluster.executor import ClusterExecutor, GpuTime, LocalExecutor, ModelExecutor
from qpruner.cluster.node_check import packed_check, versions
from qpruner.cluster.slots import Slots, local_slots, worker_resources
from qpruner.config.schema import RunConfig
from qpruner.models.loading import absolute_source, checkpoint_config
from qpruner.pipeline import preflight
from qpruner.pipeline.preflight_rows import include_path
from qpruner.plans.plan import UNPRUNED, Layout, PrecisionPlan, in_base
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.runs.events import Emit
from qpruner.runs.lock import NAME as LOCK
from qpruner.runs.lock import lock_lost
from qpruner.runs.records import PrepareRecord, PruneRecord, Record, Results, digest_of
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import display_name, fetch, fetch_file, file_digest
from qpruner.training.trackers import Trackers, trackers_of

if TYPE_CHECKING:
    from qpruner.quantization.bank import BankSource

Job = TypeVar("Job")
RecordType = TypeVar("RecordType", bound=Record)
Result = TypeVar("Result")


@dataclass
class Context:
    """The configuration, folders, cluster and records that the stages of a run share."""

    config: RunConfig
    run_dir: RunDir
    emit: Emit
    address: str | None  # of the Ray cluster to join
    inspection: preflight.Inspection
    gpu_time: GpuTime = field(default_factory=GpuTime)  # GPU seconds used outside the trials
    assumed: Slots | None = None  # planned for instead of this machine
    holds_run: Callable[[], bool] = lambda: True  # False after another driver took the run over
    records: Results = field(default_factory=Results)
    _layouts: dict[str, Layout] = field(default_factory=dict, init=False)

    def record(self, kind: type[RecordType]) -> RecordType:
        """Return the record of this class, which an earlier stage has made."""
        return next(record for _, record in self.records if isinstance(record, kind))

    def add_record(self, stage: str, record: Record) -> None:
        """Add the record of a stage, for later stages."""
        self.records = self.records.model_copy(update={stage: record})

    @property
    def data(self) -> Path:
        """Folder of the encoded rows, with a subfolder for each split; read by `load_encoded`."""
        return self.run_dir.stage("prepare") / "data"

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the cuts that the search may choose, the one that removes least first."""
        return tuple(self._usable[0])

    @property
    def unfit(self) -> dict[str, str]:
        """The cuts that were made, but whose widths the formats cannot hold, and the reason."""
        return self._usable[1]

    @cached_property
    def _usable(self) -> tuple[dict[str, str], dict[str, str]]:
        """Sort the cuts that were made by whether the formats can hold their widths.

        The first are those whose widths they can hold; the second are the others with the reason.
        """

        def usable(cut: str) -> str:
            if self.inspection.packs:
                preflight.check_offers(self.config, self.layout_of(cut), self.on_gpu)
            return cut

        made = self.record(PruneRecord).cuts
        return preflight.makeable(
            {name: name for name in self.inspection.cuts if name in made}, usable
        )

    @property
    def reference(self) -> str:
        """The cut that removes least, whose sensitivities are measured and used for all cuts."""
        return self.cuts[0]

    def checkpoint_of(self, cut: str) -> Path:
        """Return the folder of a cut's model and tokenizer, fetched to this machine."""
        return fetch(self.model_folder(cut))

    def model_folder(self, cut: str) -> Path:
        """Return the folder of a cut's model and tokenizer, where the run keeps it."""
        if cut == UNPRUNED:
            return self.run_dir.base_model(self.record(PrepareRecord))
        return self.run_dir.cut(cut)

    def bank_of(self, cut: str) -> BankSource:
        """Describe the bank of a cut.

        Its entries depend on all that `inputs` is a digest of, and on their formats.
        """
        from qpruner.quantization.bank import VERSION, BankSource

        config, quantize, made = (
            self.config,
            self.config.quantize,
            self.record(PruneRecord).cuts[cut],
        )
        starts = config.lora.model_copy(update={"dropout": 0.0})
        uses_grams = quantize.rounding == "gptq"
        calibration = (config.calibration, self.record(PrepareRecord).digest) if uses_grams else ()
        settings = (quantize.group, quantize.rounding, calibration, starts, config.seed, VERSION)
        inputs = digest_of(cut, made.digest, made.weights, *settings)
        places = (self.run_dir.bank(cut), self.model_folder(cut))
        return BankSource(
            *places,
            quantize.group,
            config.model.dtype,
            config.lora,
            config.seed,
            inputs,
            uses_grams,
        )

    @cached_property
    def worker_config(self) -> RunConfig:
        """The configuration with absolute paths, because workers run in another current folder."""
        model, evaluate = self.config.model, self.config.evaluate
        return self.config.model_copy(
            update={
                "model": model.model_copy(update={"source": absolute_source(model.source)}),
                "evaluate": evaluate.model_copy(update={"include_path": include_path(self.config)}),
            }
        )

    def task_digest(self, use: str) -> str:
        """Compute the digest of what a use, `search` or `evaluate`, asks.

        It covers the questions of the use, and the files in `evaluate.include_path`.
        """
        return digest_of(self.inspection.questions[use], *self.task_files)

    @cached_property
    def task_files(self) -> list[str]:
        """Digests of the files in `evaluate.include_path`."""
        folder = include_path(self.config)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file()) if folder else []
        return [file_digest(path) for path in files if path.suffix != ".pyc"]

    def config_of(self, cut: str) -> Any:
        """Return the transformers config of a cut's model."""
        if cut == UNPRUNED:
            return self.inspection.model_config
        with tempfile.TemporaryDirectory() as here:
            fetch_file(self.run_dir.cut(cut) / "config.json", Path(here) / "config.json")
            return checkpoint_config(Path(here))

    @property
    def on_gpu(self) -> bool:
        """Whether trials run on GPUs."""
        return bool(self.trial_resources.get("gpu"))

    def layout_of(self, cut: str) -> Layout:
        """Return the groups of a cut (layers that share a format).

        They serve to compute the bytes of any plan.
        """
        if cut not in self._layouts:
            self._layouts[cut] = preflight.layout_for(
                self.config, self.config_of(cut), self.on_gpu, cut
            )
        return self._layouts[cut]

    @property
    def checkpoint_bytes(self) -> int:
        """Estimated bytes of a training checkpoint at most.

        It has the adapter of the base model and its two Adam moments.
        """
        return 3 * self.inspection.base.trained_bytes

    def base_groups_of(self, cut: str) -> tuple[str, ...]:
        """Return the groups of a cut by their names in the base model.

        The names differ because blocks that were dropped shift numbers.
        """
        count = int(self.inspection.model_config.num_hidden_layers)
        groups = [group.name for group in self.layout_of(cut).groups]
        return in_base(groups, count, self.record(PruneRecord).cuts[cut].dropped_blocks)

    @cached_property
    def space(self) -> SearchSpace:
        """All plans within the budget, of the cuts that have one and may win."""
        spaces = map(self.space_of, self._fast_enough)
        losses = {cut: made.loss for cut, made in self.record(PruneRecord).cuts.items()}
        return SearchSpace(
            tuple(space for space in spaces if space.is_feasible(space.smallest())), losses
        )

    def space_of(self, cut: str, layout: Layout | None = None) -> PlanSpace:
        """Return all plans of a cut within the budget.

        `layout` is given if other formats are offered than those of the run.
        """
        return PlanSpace.of(
            layout or self.layout_of(cut), self.budget_bytes, self.base_groups_of(cut)
        )

    @cached_property
    def budget_bytes(self) -> int:
        """The bytes that a plan may have."""
        return preflight.budget_bytes(self.config, self._fast_enough)

    def may_win(self, cut: str) -> bool:
        """Return True if a token takes few enough multiply-adds on this cut.

        They may be no more than `budget.flops_fraction` allows.
        """
        return preflight.is_fast(self.config, self.layout_of(cut), self.inspection.base)

    @property
    def _fast_enough(self) -> dict[str, Layout]:
        return preflight.fast_enough(
            self.config, {cut: self.layout_of(cut) for cut in self.cuts}, self.inspection.base
        )

    @cached_property
    def plan_in_file(self) -> PrecisionPlan | None:
        """The plan of the file in `search.plan`, or None without a file."""
        return preflight.plan_in_file(
            self.config, self._fast_enough, self.layout_of(UNPRUNED), self.budget_bytes
        )

    @cached_property
    def trackers(self) -> Trackers | None:
        """The configured experiment trackers, or None."""
        names = self.config.trackers
        if not names:
            return None
        root = self.run_dir.root
        run = display_name(root).rstrip("/").rpartition("/")[2]
        return trackers_of(names, run, root)

    @cached_property
    def cluster(self) -> Cluster:
        """The Ray cluster at `address`, or a new one on this machine; connects on first use."""
        return connect(self.address)

    @property
    def slots(self) -> Slots:
        """The room for trials (slots) on the machines that the cluster has now."""
        return self.cluster.slots()

    @property
    def known_slots(self) -> Slots:
        """The room for trials at `address`, on the machine that `check --gpu` assumes, or here.

        Reading it does not start Ray.
        """
        return self.slots if self.address else self.assumed or local_slots()

    @cached_property
    def executor(self) -> ModelExecutor:
        """The executor of work on a single model.

        It is an actor on the cluster at `address`, otherwise this process.

        The actor reserves one GPU, or all GPUs of a machine if `model.device_map` is auto. Without
        GPUs it reserves all cores of a machine.
        """
        is_spread = self.config.model.device_map == "auto"
        if not self.address:
            present = local_slots().gpus
            return LocalExecutor(present if is_spread else min(present, 1.0), self.gpu_time)
        resources, largest = self.trial_resources, self.slots.largest
        if resources.get("gpu"):
            resources = resources | {
                "gpu": largest.gpus if is_spread else max(1.0, resources["gpu"])
            }
        else:
            resources = {"cpu": float(int(largest.cpus))}
        return ClusterExecutor(resources, self.gpu_time, self.check_node)

    @cached_property
    def check_node(self) -> bytes:
        """A pickled function that checks a node.

        Every process on the cluster calls this function first.
        """
        if not self.address:
            return packed_check({}, None)
        return packed_check(versions(), self.run_dir)

    @cached_property
    def trial_resources(self) -> dict[str, float]:
        """The resources that Ray reserves for one trial."""
        asked, slots = self.config.search.resources_per_trial, self.known_slots
        resources = slots.resources_per_trial(asked.model_dump() if asked else None)
        slots.concurrent(resources, None)
        return resources

    def gpus_held(self, num_workers: int = 1) -> float:
        """Return how many GPUs a task with this many workers reserves."""
        return num_workers * worker_resources(self.trial_resources, num_workers).get("gpu", 0.0)

    def task_resources(self, num_tasks: int, num_workers: int = 1) -> tuple[dict[str, float], int]:
        """Return a worker's resources, and how many of `num_tasks` run at once.

        Without GPUs tasks share the cores.
        """
        resources, slots = worker_resources(self.trial_resources, num_workers), self.slots
        room = slots.at_most(resources)
        if limit := self.config.search.max_concurrent:
            room = min(room, limit)
        # While every machine is away, the tasks run one after the other.
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
        own_process: bool = False,
        **more: Any,
    ) -> Iterator[tuple[int, Result]]:
        """Run `function(job)` for all jobs on nodes that pass `check_node`.

        Yield position and result of each job.
        """
        from qpruner.cluster.tasks import run_tasks

        return run_tasks(
            function, jobs, resources, concurrent, own_process, self.check_node, **more
        )

    def check_lock(self, stage: str) -> None:
        """Raise an error if another driver took over the lock.

        That may happen, for example, while this process was suspended.
        """
        if not self.holds_run():
            raise lock_lost(
                stage,
                f"{display_name(self.run_dir.root / LOCK)} belongs to another driver, "
                "or is missing",
            )

    def forget(self, stage: str) -> None:
        """Delete the record of a stage."""
        self.check_lock(stage)
        self.run_dir.forget(stage)

    def close(self) -> None:
        """Disconnect from the cluster, unless the caller had connected before."""
        if "cluster" in self.__dict__ and not self.cluster.was_joined:
            disconnect()
