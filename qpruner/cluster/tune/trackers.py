"""Trials in the trackers: Ray's own callbacks, by optimizer step."""

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
"""What is logged of a rung; Ray adds its own clocks and hosts."""
UPLOAD_SECONDS = 120
"""How long the end of a search waits for uploads."""


def tracker_callbacks(trackers: Trackers, emit: Emit) -> list[Callback]:
    """Return the callbacks for Tune that log trials to the trackers; the first error of each is emitted."""
    mlflow = partial(MLflowLoggerCallback, trackers.tracking_uri, experiment_name=trackers.experiment)
    kinds: dict[str, Callable[[], Callback]] = {"wandb": partial(WandbRows, trackers), "mlflow": mlflow}
    return [_Guarded(name, kinds[name], emit) for name in trackers.names]


class WandbRows(WandbLoggerCallback):  # type: ignore[misc]
    """Logs trials to Weights & Biases."""

    def __init__(self, trackers: Trackers) -> None:
        settings = trackers.wandb_settings("trial")
        super().__init__(upload_timeout=UPLOAD_SECONDS, environment=trackers.environment, **settings)
        # Ray's own gives the key to the actor's runtime environment, which Ray writes to its logs (2.60).
        self._remote_logger_class = ray.remote(num_cpus=0, **on_current_node())(_WandbWriter)

    def _cleanup_logging_actor(self, trial: Trial) -> None:
        written = self._trial_logging_futures[trial]
        super()._cleanup_logging_actor(trial)
        if ray.wait([written], timeout=0)[0]:
            ray.get(written)  # raises what the actor met


class _WandbWriter(WandbLoggingActor):  # type: ignore[misc]
    """The process that writes one row."""

    def __init__(self, *args: Any, environment: Mapping[str, str], **kwargs: Any) -> None:
        os.environ.update(environment)
        super().__init__(*args, **kwargs)


def _guarded(hook: str) -> Callable[..., None]:
    def call(self: _Guarded, **info: Any) -> None:
        self.guard.run(lambda: getattr(self.inner, hook)(**info))

    return call


class _Guarded(LivesInDriver, Callback):  # type: ignore[misc]
    """Passes Tune's calls on until the first error."""

    def __init__(self, name: str, make: Callable[[], Callback], emit: Emit) -> None:
        self._make, self.inner = make, Callback()
        self.guard = Guard(name, lambda text: emit(Message("search", f"warning: {text}")))

    def setup(self, **info: Any) -> None:
        def make() -> None:
            self.inner = self._make()
            self.inner.setup(**info)

        self.guard.run(make)

    def on_trial_result(self, result: dict[str, Any], **info: Any) -> None:
        figures = {name: result[name] for name in FIGURES if name in result} | {TRAINING_ITERATION: result[TIME]}
        self.guard.run(lambda: self.inner.on_trial_result(result=figures, **info))

    on_trial_start = _guarded("on_trial_start")
    on_trial_complete = _guarded("on_trial_complete")
    on_trial_error = _guarded("on_trial_error")
    on_experiment_end = _guarded("on_experiment_end")
