"""Log trials to Weights & Biases and MLflow with Ray's callbacks, by optimizer step."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
from ray.air.constants import TRAINING_ITERATION
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune.callback import Callback
from ray.tune.experiment import Trial

from qpruner.cluster.ray_private import WandbLoggingActor, on_current_node
from qpruner.cluster.tune.job import METRIC, TIME, LivesInDriver
from qpruner.runs.events import Emit, Message
from qpruner.training.trackers import Guard, Trackers

FIGURES = (METRIC, "loss", "accuracy", "accuracy_stderr", "train_loss")
"""The values of a rung that are logged; what Ray adds, such as clocks and host names, is not."""

HOOKS = (
    "setup",
    "on_trial_start",
    "on_trial_result",
    "on_trial_complete",
    "on_trial_error",
    "on_experiment_end",
)
"""The methods of Ray's callbacks that call the tracker."""

UPLOAD_SECONDS = 120  # time that the end of a search waits for uploads


def tracker_callbacks(trackers: Trackers | None, emit: Emit) -> list[Callback]:
    """Return a callback of Tune for each tracker; none without `trackers`.

    A tracker gets nothing more after its first error, which is emitted as a warning.
    """
    if trackers is None:
        return []

    def warn(text: str) -> None:
        emit(Message("search", f"warning: {text}"))

    callbacks = []
    for name in trackers.names:
        callback = KINDS[name](trackers)
        guard = Guard(name, warn)
        for hook in HOOKS:
            setattr(callback, hook, partial(guard.call, getattr(callback, hook)))
        callbacks.append(callback)
    return callbacks


class _OwnFigures(LivesInDriver):
    """Logs the `FIGURES` of a rung under its optimizer step."""

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        figures = {name: result[name] for name in FIGURES if name in result}
        figures[TRAINING_ITERATION] = result[TIME]
        super().log_trial_result(iteration, trial, figures)  # type: ignore[misc]


class MlflowRows(_OwnFigures, MLflowLoggerCallback):  # type: ignore[misc]
    """Logs trials to MLflow."""

    def __init__(self, trackers: Trackers) -> None:
        super().__init__(
            tracking_uri=trackers.environment["MLFLOW_TRACKING_URI"],
            experiment_name=trackers.environment["MLFLOW_EXPERIMENT_NAME"],
        )


class WandbRows(_OwnFigures, WandbLoggerCallback):  # type: ignore[misc]
    """Logs trials to Weights & Biases."""

    def __init__(self, trackers: Trackers) -> None:
        super().__init__(
            project=trackers.environment["WANDB_PROJECT"],
            group=trackers.run,
            job_type="trial",
            upload_timeout=UPLOAD_SECONDS,
            environment=trackers.environment,
        )
        # Ray's class (2.60) puts the key into the runtime environment of the actor, which Ray
        # writes to its logs.
        self._remote_logger_class = ray.remote(num_cpus=0, **on_current_node())(_WandbWriter)

    def _cleanup_logging_actor(self, trial: Trial) -> None:
        written = self._trial_logging_futures[trial]
        super()._cleanup_logging_actor(trial)
        if ray.wait([written], timeout=0)[0]:
            ray.get(written)  # raises the error of the actor


class _WandbWriter(WandbLoggingActor):  # type: ignore[misc]
    """Logs one trial to W&B from a process of its own."""

    def __init__(self, *args: Any, environment: Mapping[str, str], **kwargs: Any) -> None:
        os.environ.update(environment)
        super().__init__(*args, **kwargs)


KINDS = {"wandb": WandbRows, "mlflow": MlflowRows}
