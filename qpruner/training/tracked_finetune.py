"""A fine-tune as trackers show it: transformers' own callbacks, each in the row that is this fine-tune's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, WandbCallback

from qpruner.training.trackers import KIND, ROW, Guard, Trackers, mlflow_row, mlflow_steps


class Tracked(TrainerCallback):  # type: ignore[misc]
    """Passes on what a training loop tells of itself; models and checkpoints are not uploaded.

    Attributes:
        troubles: Why a tracker was not told of all.
    """

    def __init__(self) -> None:
        self.troubles: list[str] = []
        self._rows: list[tuple[Guard, WandbRow | MlflowRow]] = []

    def open(self, tracker: str, trackers: Trackers, name: str, label: str, about: Mapping[str, Any]) -> None:
        """Open one tracker's row."""
        guard = Guard(tracker, self.troubles.append)
        row = trackers.row("fine-tune", name)
        guard.tell(lambda: self._rows.append((guard, ROWS[tracker](trackers, row, label, about))))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for guard, row in self._rows:
            guard.tell(partial(row.on_train_begin, args, state, control, **kwargs))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for guard, row in self._rows:
            guard.tell(partial(row.on_log, args, state, control, **kwargs))

    def close(self) -> None:
        """Close the rows."""
        for guard, row in self._rows:
            guard.tell(row.close)


@contextmanager
def tracked(trackers: Trackers | None, name: str, label: str, about: Mapping[str, Any]) -> Iterator[Tracked]:
    """Have trackers told of the fine-tune inside.

    Args:
        trackers: Who is told; nobody where there are none.
        name: Tells this fine-tune from others of the run.
        label: The same for people.
        about: What its row says from the beginning.
    """
    told = Tracked()
    if trackers:
        os.environ.update(trackers.environment)
        for tracker in trackers.names:
            told.open(tracker, trackers, name, label, about)
    try:
        yield told
    finally:
        told.close()


class WandbRow(WandbCallback):  # type: ignore[misc]
    """A row of Weights & Biases; a step that is told again is the same line of it."""

    def __init__(self, trackers: Trackers, row: str, label: str, about: Mapping[str, Any]) -> None:
        super().__init__()
        settings = trackers.wandb_settings("fine-tune")
        self._wandb.init(id=row, name=label, config=dict(about), **settings)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        figures = {f"train/{name}": value for name, value in logs.items()}
        self._wandb.log(figures | {"train/global_step": step}, step=step)

    def close(self) -> None:
        self._wandb.finish()


class MlflowRow(MLflowCallback):  # type: ignore[misc]
    """A row of MLflow; what it has of a step is not told again."""

    def __init__(self, trackers: Trackers, row: str, label: str, about: Mapping[str, Any]) -> None:
        super().__init__()
        mlflow = self._ml_flow
        mlflow.set_tracking_uri(trackers.tracking_uri)
        experiment = mlflow.set_experiment(trackers.experiment)
        client = mlflow.MlflowClient()
        known = mlflow_row(client, experiment.experiment_id, row)
        self._steps = mlflow_steps(client, known, "loss") if known else frozenset()
        tags = {ROW: row, KIND: "fine-tune"}
        mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=label, tags=tags)
        if not known:
            mlflow.log_params(dict(about))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step not in self._steps:
            super().on_log(args, state, control, logs, **kwargs)

    def close(self) -> None:
        self._ml_flow.flush_async_logging()
        self._ml_flow.end_run()


ROWS: dict[str, type[WandbRow] | type[MlflowRow]] = {"wandb": WandbRow, "mlflow": MlflowRow}
