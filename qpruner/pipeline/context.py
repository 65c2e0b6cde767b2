"""The state that all stages of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qpruner.cluster.slots import Slots
from qpruner.config.schema import LearningRates, RunConfig
from qpruner.models.loading import absolute_source
from qpruner.pipeline.machines import Machines
from qpruner.pipeline.places import Places
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import include_path
from qpruner.pipeline.shapes import Shapes, recorded_shapes
from qpruner.runs.events import Emit
from qpruner.runs.lock import NAME as LOCK
from qpruner.runs.lock import lock_lost
from qpruner.runs.records import PruneRecord, Record, RecordType, Results, digest_of
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import display_name, file_digest
from qpruner.training.trackers import Trackers, trackers_of


@dataclass
class Context:
    """The configuration and the records of a run, and what they lead to.

    `places` knows where things are, `shapes` what the cuts look like and which plans they allow,
    `machines` what runs where.
    """

    config: RunConfig
    run_dir: RunDir
    emit: Emit
    address: str | None  # of the Ray cluster to join
    inspection: Inspection
    assumed: Slots | None = None  # planned for instead of this machine
    holds_run: Callable[[], bool] = lambda: True  # False after another driver took the run over
    records: Results = field(default_factory=Results)

    def record(self, kind: type[RecordType]) -> RecordType:
        """Return the record of this class, which an earlier stage has made."""
        return self.records.get(kind)

    def add_record(self, stage: str, record: Record) -> None:
        """Add the record of a stage, for later stages."""
        self.records = self.records.model_copy(update={stage: record})

    @property
    def places(self) -> Places:
        """The folders that the records describe."""
        return Places(self.config, self.run_dir, self.records)

    @cached_property
    def machines(self) -> Machines:
        """The machines of the run."""
        return Machines(self.config, self.run_dir, self.address, self.assumed)

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the cuts that were made; those expected are in `inspection`."""
        return recorded_shapes(
            self.inspection.shapes,
            self.config,
            self.record(PruneRecord),
            self.places.config_of,
            self.machines.on_gpu,
        )

    @property
    def worker_config(self) -> RunConfig:
        """The configuration for workers.

        Paths are absolute, because workers run in another current folder. Learning rates are those
        that the pilot chose, once it has.
        """
        model = self.config.model
        model = model.model_copy(update={"source": absolute_source(model.source)})
        folder = include_path(self.config)
        evaluate = self.config.evaluate.model_copy(update={"include_path": folder})
        changes: dict[str, Any] = {"model": model, "evaluate": evaluate}
        if self.records.pilot:
            rates = self.records.pilot.rates
            fallback = next(iter(rates.values()))  # no plan of the run is trained by it
            chosen = LearningRates(
                adapter=rates.get("adapter", fallback), scales=rates.get("scales", fallback)
            )
            changes["training"] = self.config.training.model_copy(update={"learning_rate": chosen})
        return self.config.model_copy(update=changes)

    def task_digest(self, use: str) -> str:
        """Compute the digest of what a use, `search` or `evaluate`, asks.

        It covers the questions of the use, and the files in `evaluate.include_path`.
        """
        return digest_of(self.inspection.rows.questions[use], *self.task_files)

    @cached_property
    def task_files(self) -> list[str]:
        """Digests of the files in `evaluate.include_path`."""
        folder = include_path(self.config)
        if folder is None:
            return []
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [file_digest(path) for path in files if path.suffix != ".pyc"]

    @cached_property
    def trackers(self) -> Trackers | None:
        """The configured experiment trackers, or None."""
        names = self.config.trackers
        if not names:
            return None
        root = self.run_dir.root
        run = display_name(root).rstrip("/").rpartition("/")[2]
        return trackers_of(names, run, root)

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
        self.machines.close()
