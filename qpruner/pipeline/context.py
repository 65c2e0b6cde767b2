"""What every stage of a run shares: configuration, folders, the pruned model, the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qpruner import preflight
from qpruner.config import RunConfig
from qpruner.errors import UserError
from qpruner.events import Emit
from qpruner.execution.cluster import Slots, connect, disconnect
from qpruner.memory import release
from qpruner.models.loading import checkpoint_config
from qpruner.plan import Layout, PlanSpace, PrecisionPlan
from qpruner.plan_file import read_plan
from qpruner.records import digest_of
from qpruner.rundir import RunDir, file_digest


@dataclass
class Context:
    """One run at work.

    Attributes:
        config: The configuration.
        run_dir: The run folder.
        emit: Told of every event.
        address: A Ray cluster to join, or None.
        inspection: What was known before the first stage.
    """

    config: RunConfig
    run_dir: RunDir
    emit: Emit
    address: str | None
    inspection: preflight.Inspection
    _model: Any = field(default=None, repr=False)
    _connected: bool = False

    @property
    def data(self) -> Path:
        """The encoded rows, one folder a split."""
        return self.run_dir.stage("prepare") / "data"

    @property
    def checkpoint(self) -> Path:
        """The pruned model and its tokenizer."""
        return self.run_dir.stage("prune")

    @property
    def bank(self) -> Path:
        """The bank's files."""
        return self.run_dir.stage("bank")

    @cached_property
    def worker_config(self) -> RunConfig:
        """The configuration with package paths resolved, as workers and lm-eval need them."""
        evaluate = self.config.evaluate.model_copy(update={"include_path": preflight.include_path(self.config)})
        return self.config.model_copy(update={"evaluate": evaluate})

    @cached_property
    def task_digest(self) -> str:
        """Digest of the tasks' questions and files: with others it is another measurement."""
        folder = preflight.include_path(self.config)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file()) if folder else []
        return digest_of(self.inspection.questions, *[file_digest(path) for path in files if path.suffix != ".pyc"])

    @cached_property
    def layout(self) -> Layout:
        """Groups and sizes of the pruned model as it is."""
        return preflight.layout_for(self.config, checkpoint_config(self.checkpoint))

    @cached_property
    def space(self) -> PlanSpace:
        """The plans inside the budget."""
        quantize = self.config.quantize
        budget = preflight.budget_bytes(quantize, self.layout, self.config.search.pareto)
        return PlanSpace.of(self.layout, quantize.bits, budget)

    @cached_property
    def given_plan(self) -> PrecisionPlan | None:
        """The plan that `search.plan` names.

        Raises:
            UserError: If it is no plan for this model, or over the budget.
        """
        if self.config.search.plan is None:
            return None
        plan = read_plan(Path(self.config.search.plan), self.space.groups, self.space.levels)
        if not self.space.is_feasible(plan):
            size, budget = self.space.plan_bytes(plan) / 1e6, self.space.budget_bytes / 1e6
            raise UserError(
                f"`search.plan`: the plan takes {size:.2f} MB, more than the budget of {budget:.2f} MB: give groups "
                "fewer bits, or raise `quantize.budget`"
            )
        return plan

    @cached_property
    def slots(self) -> Slots:
        """The cluster's slots; connects on first use."""
        self._connected = True
        return connect(self.address)

    def keep_pruned_model(self, model: Any) -> None:
        """Hand the cut model to the next stages, so that it is not loaded again."""
        self._model = model

    def pruned_model(self) -> Any:
        """The pruned model on this process's device; loaded if an earlier session cut it."""
        if self._model is None:
            from qpruner.models.loading import load_dense

            self._model = load_dense(str(self.checkpoint), self.config.model.dtype)
        return self._model

    def drop_pruned_model(self) -> None:
        """Free its memory before the trials start."""
        self._model = None
        release()

    def trial_resources(self) -> dict[str, float]:
        """What Ray reserves for one trial."""
        asked = self.config.search.resources_per_trial
        return self.slots.resources_per_trial(asked.model_dump() if asked else None)

    def task_resources(self, num_tasks: int) -> tuple[dict[str, float], int]:
        """Resources of one of several equal tasks, and how many run at once; a lone task gets every core."""
        resources = self.trial_resources()
        concurrent = min(self.slots.concurrent(resources, None), num_tasks)
        if not resources.get("gpu"):
            resources = {"cpu": float(max(1, int(self.slots.cpus // concurrent)))}
        return resources, concurrent

    def close(self) -> None:
        """Leave the cluster."""
        if self._connected:
            disconnect()
