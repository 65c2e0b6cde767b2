"""Trials as trackers show them: Ray's own callbacks, each trial in the row that is this trial's, by optimizer step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray.air.constants import TRAINING_ITERATION
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback, _WandbLoggingActor
from ray.air.util.node import _force_on_current_node
from ray.tune.callback import Callback
from ray.tune.experiment import Trial

from qpruner.cluster.tune.job import METRIC, TIME, LivesInDriver
from qpruner.runs.events import Emit, Message
from qpruner.training.trackers import KIND, ROW, Guard, Trackers, mlflow_row, mlflow_steps

FIGURES = (METRIC, "loss", "accuracy", "accuracy_stderr", "train_loss")
"""What is told of a rung; Ray adds its own clocks and hosts."""
UPLOAD_SECONDS = 120
"""What is on its way is waited for at the end of a search."""


def tracker_callbacks(trackers: Trackers, emit: Emit) -> list[Callback]:
    """What Tune calls to have the trackers told.

    Args:
        trackers: Who is told.
        emit: Told once of a tracker that cannot be told any more.
    """
    kinds: dict[str, Callable[[Trackers], WandbRows | MlflowRows]] = {"wandb": WandbRows, "mlflow": MlflowRows}
    return [_Guarded(name, partial(kinds[name], trackers), emit) for name in trackers.names]


def _row(trackers: Trackers, trial: Trial) -> str:
    return trackers.row("trial", f"{trial.config['trial']:04d}")


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: result[name] for name in FIGURES if name in result}


class WandbRows(WandbLoggerCallback):  # type: ignore[misc]
    """Rows of Weights & Biases. A step that is told again is the same line of it."""

    def __init__(self, trackers: Trackers) -> None:
        settings = trackers.wandb_settings("trial")
        super().__init__(upload_timeout=UPLOAD_SECONDS, environment=trackers.environment, **settings)
        self._trackers = trackers
        # Ray's own gives the key to the actor's runtime environment, which Ray writes to its logs (2.60).
        self._remote_logger_class = ray.remote(num_cpus=0, **_force_on_current_node())(_WandbWriter)

    def log_trial_start(self, trial: Trial) -> None:
        self.kwargs["id"] = _row(self._trackers, trial)
        super().log_trial_start(trial)

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        super().log_trial_result(iteration, trial, _figures(result) | {TRAINING_ITERATION: result[TIME]})

    def _cleanup_logging_actor(self, trial: Trial) -> None:
        written = self._trial_logging_futures[trial]
        super()._cleanup_logging_actor(trial)
        if ray.wait([written], timeout=0)[0]:
            ray.get(written)  # raises what the actor met


class _WandbWriter(_WandbLoggingActor):  # type: ignore[misc]
    """The process that writes one row."""

    def __init__(self, *args: Any, environment: Mapping[str, str], **kwargs: Any) -> None:
        os.environ.update(environment)
        super().__init__(*args, **kwargs)


class MlflowRows(MLflowLoggerCallback):  # type: ignore[misc]
    """Rows of MLflow. What it has of a step is not told again."""

    def __init__(self, trackers: Trackers) -> None:
        super().__init__(trackers.tracking_uri, experiment_name=trackers.experiment)
        self._trackers = trackers
        self._steps: dict[Trial, frozenset[int]] = {}

    def log_trial_start(self, trial: Trial) -> None:
        row = _row(self._trackers, trial)
        client = self.mlflow_util._get_client()
        known = mlflow_row(client, self.mlflow_util.experiment_id, row)
        if known is None:
            self.tags = {ROW: row, KIND: "trial"}
            super().log_trial_start(trial)
            return
        self._trial_runs[trial] = known
        self._steps[trial] = mlflow_steps(client, known, METRIC)
        client.update_run(known, status="RUNNING")

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        if result[TIME] not in self._steps.get(trial, ()):
            self.mlflow_util.log_metrics(result[TIME], _figures(result), self._trial_runs[trial])


class _Guarded(LivesInDriver, Callback):  # type: ignore[misc]
    """Passes Tune's calls on until the first error."""

    def __init__(self, name: str, make: Callable[[], WandbRows | MlflowRows], emit: Emit) -> None:
        self._make = make
        self._guard = Guard(name, lambda text: emit(Message("search", f"warning: {text}")))

    def setup(self, **info: Any) -> None:
        def work() -> None:
            self._inner = self._make()
            self._inner.setup(**info)

        self._guard.tell(work)

    def on_trial_start(self, **info: Any) -> None:
        self._guard.tell(lambda: self._inner.on_trial_start(**info))

    def on_trial_result(self, **info: Any) -> None:
        self._guard.tell(lambda: self._inner.on_trial_result(**info))

    def on_trial_complete(self, **info: Any) -> None:
        self._guard.tell(lambda: self._inner.on_trial_complete(**info))

    def on_trial_error(self, **info: Any) -> None:
        self._guard.tell(lambda: self._inner.on_trial_error(**info))

    def on_experiment_end(self, **info: Any) -> None:
        self._guard.tell(lambda: self._inner.on_experiment_end(**info))
