"""Logs trials to the trackers W&B and MLflow through Ray's callbacks, by optimizer step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
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
"""The values of a rung that are logged; those that Ray adds, such as clocks and host names, are
left out."""
UPLOAD_SECONDS = 120  # time that the end of a search waits for uploads


def tracker_callbacks(trackers: Trackers, emit: Emit) -> list[Callback]:
    """Return a callback of Tune for each tracker.

    A tracker is left out after its first error, which is emitted.
    """
    mlflow = partial(
        MLflowLoggerCallback, trackers.tracking_uri, experiment_name=trackers.experiment
    )
    kinds: dict[str, Callable[[], Callback]] = {
        "wandb": partial(WandbRows, trackers),
        "mlflow": mlflow,
    }
    return [_Guarded(name, kinds[name], emit) for name in trackers.names]


class WandbRows(WandbLoggerCallback):  # type: ignore[misc]
    """Logs trials to Weights & Biases."""

    def __init__(self, trackers: Trackers) -> None:
        settings = trackers.wandb_settings("trial")
        super().__init__(
            upload_timeout=UPLOAD_SECONDS, environment=trackers.environment, **settings
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


def _guarded(hook: str) -> Callable[..., None]:
    """Make a method that passes a call of Tune to the method `hook` of the inner callback."""

    def call(self: _Guarded, **info: Any) -> None:
        self.guard.run(lambda: getattr(self.inner, hook)(**info))

    return call


class _Guarded(LivesInDriver, Callback):  # type: ignore[misc]
    """Passes the calls of Tune to a tracker's callback until the first error of the tracker."""

    def __init__(self, name: str, make: Callable[[], Callback], emit: Emit) -> None:
        self._make, self.inner = make, Callback()
        self.guard = Guard(name, lambda text: emit(Message("search", f"warning: {text}")))

    def setup(self, **info: Any) -> None:
        def make() -> None:
            self.inner = self._make()
            self.inner.setup(**info)

        self.guard.run(make)

    def on_trial_result(self, result: dict[str, Any], **info: Any) -> None:
        figures = {name: result[name] for name in FIGURES if name in result} | {
            TRAINING_ITERATION: result[TIME]
        }
        self.guard.run(lambda: self.inner.on_trial_result(result=figures, **info))

    on_trial_start = _guarded("on_trial_start")
    on_trial_complete = _guarded("on_trial_complete")
    on_trial_error = _guarded("on_trial_error")
    on_experiment_end = _guarded("on_experiment_end")
