"""Log a fine-tune to the trackers with transformers' callbacks, as one run in each tracker."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, WandbCallback

from qpruner.training.trackers import Guard, Trackers

TrackerRun = tuple[TrainerCallback, Callable[[], object]]
"""The callback that logs to a run in a tracker, and the function that closes that run."""


class Tracked(TrainerCallback):  # type: ignore[misc]
    """Passes a training loop's logs to the trackers; `errors` has a line for every tracker that
    lacks some."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.runs: list[tuple[Guard, TrainerCallback, Callable[[], object]]] = []

    def open(self, tracker: str, trackers: Trackers, label: str, about: Mapping[str, Any]) -> None:
        """Open a run in one tracker."""
        guard = Guard(tracker, self.errors.append)
        guard.run(lambda: self.runs.append((guard, *OPENERS[tracker](trackers, label, about))))

    def on_train_begin(self, *event: Any, **kwargs: Any) -> None:
        """Tell every tracker that the training begins."""
        for guard, callback, _ in self.runs:
            guard.run(partial(callback.on_train_begin, *event, **kwargs))

    def on_log(self, *event: Any, **kwargs: Any) -> None:
        """Log the training's figures to every tracker."""
        for guard, callback, _ in self.runs:
            guard.run(partial(callback.on_log, *event, **kwargs))


@contextmanager
def tracked(trackers: Trackers | None, label: str, about: Mapping[str, Any]) -> Iterator[Tracked]:
    """Log the training inside the `with` block to each tracker, as a run named `label` with the
    parameters `about`."""
    callback = Tracked()
    if trackers:
        os.environ.update(trackers.environment)
        for tracker in trackers.names:
            callback.open(tracker, trackers, label, about)
    try:
        yield callback
    finally:
        for guard, _, close in callback.runs:
            guard.run(close)


def _open_wandb(trackers: Trackers, label: str, about: Mapping[str, Any]) -> TrackerRun:
    import wandb

    wandb.init(name=label, config=dict(about), **trackers.wandb_settings("fine-tune"))
    return WandbCallback(), wandb.finish


def _open_mlflow(trackers: Trackers, label: str, about: Mapping[str, Any]) -> TrackerRun:
    import mlflow

    mlflow.set_tracking_uri(trackers.tracking_uri)
    mlflow.set_experiment(trackers.experiment)
    mlflow.start_run(run_name=label)
    mlflow.log_params(dict(about))

    def close() -> None:
        mlflow.flush_async_logging()
        mlflow.end_run()

    return MLflowCallback(), close


OPENERS = {"wandb": _open_wandb, "mlflow": _open_mlflow}
