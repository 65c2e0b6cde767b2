"""A fine-tune in the trackers: transformers' own callbacks, each in a row of this fine-tune."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, WandbCallback

from qpruner.training.trackers import Guard, Trackers

Row = tuple[TrainerCallback, Callable[[], object]]
"""A tracker's callback, and what closes its row."""


class Tracked(TrainerCallback):  # type: ignore[misc]
    """Passes a training loop's logs to the trackers; models and checkpoints are not uploaded.

    `errors` has a line for every tracker that did not get all logs.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.rows: list[tuple[Guard, TrainerCallback, Callable[[], object]]] = []

    def open(self, tracker: str, trackers: Trackers, label: str, about: Mapping[str, Any]) -> None:
        """Open a row of one tracker."""
        guard = Guard(tracker, self.errors.append)
        guard.run(lambda: self.rows.append((guard, *ROWS[tracker](trackers, label, about))))

    def on_train_begin(self, *event: Any, **kwargs: Any) -> None:
        """Pass the event on."""
        for guard, row, _ in self.rows:
            guard.run(partial(row.on_train_begin, *event, **kwargs))

    def on_log(self, *event: Any, **kwargs: Any) -> None:
        """Pass the event on."""
        for guard, row, _ in self.rows:
            guard.run(partial(row.on_log, *event, **kwargs))


@contextmanager
def tracked(trackers: Trackers | None, label: str, about: Mapping[str, Any]) -> Iterator[Tracked]:
    """Log the fine-tune inside to the run's trackers, in rows of this label with these parameters."""
    callback = Tracked()
    if trackers:
        os.environ.update(trackers.environment)
        for tracker in trackers.names:
            callback.open(tracker, trackers, label, about)
    try:
        yield callback
    finally:
        for guard, _, close in callback.rows:
            guard.run(close)


def _wandb_row(trackers: Trackers, label: str, about: Mapping[str, Any]) -> Row:
    import wandb

    wandb.init(name=label, config=dict(about), **trackers.wandb_settings("fine-tune"))
    return WandbCallback(), wandb.finish


def _mlflow_row(trackers: Trackers, label: str, about: Mapping[str, Any]) -> Row:
    import mlflow

    mlflow.set_tracking_uri(trackers.tracking_uri)
    mlflow.set_experiment(trackers.experiment)
    mlflow.start_run(run_name=label)
    mlflow.log_params(dict(about))

    def close() -> None:
        mlflow.flush_async_logging()
        mlflow.end_run()

    return MLflowCallback(), close


ROWS = {"wandb": _wandb_row, "mlflow": _mlflow_row}
