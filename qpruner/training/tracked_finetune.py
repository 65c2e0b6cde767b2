"""Log a fine-tune to the trackers with transformers' callbacks, as one run in each tracker."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, WandbCallback

from qpruner.training.trackers import Guard, Trackers


class Tracked(TrainerCallback):  # type: ignore[misc]
    """Passes a training loop's logs to transformers' callback of each tracker.

    A tracker gets nothing more after its first error, for which `errors` has a line.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._runs: list[tuple[str, Guard, TrainerCallback]] = []

    def open(self, trackers: Trackers, label: str, parameters: dict[str, Any]) -> None:
        """Open a run in every tracker."""
        for name in trackers.names:
            guard = Guard(name, self.errors.append)
            guard.call(self._open, name, guard, trackers.run, label, parameters)

    def _open(
        self, tracker: str, guard: Guard, group: str, label: str, parameters: dict[str, Any]
    ) -> None:
        if tracker == "wandb":
            import wandb

            wandb.init(name=label, group=group, job_type="fine-tune", config=parameters)
            callback = WandbCallback()
        else:
            import mlflow

            mlflow.start_run(run_name=label)
            mlflow.log_params(parameters)
            callback = MLflowCallback()
        self._runs.append((tracker, guard, callback))

    def on_train_begin(self, *event: Any, **state: Any) -> None:
        """Tell every tracker that the training begins."""
        for _, guard, callback in self._runs:
            guard.call(callback.on_train_begin, *event, **state)

    def on_log(self, *event: Any, **state: Any) -> None:
        """Log the training's figures to every tracker."""
        for _, guard, callback in self._runs:
            guard.call(callback.on_log, *event, **state)

    def close(self) -> None:
        """Close the run in every tracker."""
        for name, guard, _ in self._runs:
            guard.call(_close, name)


@contextmanager
def tracked(
    trackers: Trackers | None, label: str, parameters: Mapping[str, Any]
) -> Iterator[Tracked]:
    """Log the training inside the `with` block to each tracker.

    Args:
        trackers: The trackers of the run; with None nothing is logged.
        label: Name of the run in the trackers.
        parameters: Parameters that the trackers show in addition to the training's own.

    Yields:
        The callback to give to the training loop.
    """
    callback = Tracked()
    if trackers:
        os.environ.update(trackers.environment)
        callback.open(trackers, label, dict(parameters))
    try:
        yield callback
    finally:
        callback.close()


def _close(tracker: str) -> None:
    if tracker == "wandb":
        import wandb

        wandb.finish()
    else:
        import mlflow

        mlflow.flush_async_logging()
        mlflow.end_run()
