"""The trackers that people compare runs with beside TensorBoard, where `trackers` names them: Weights & Biases, MLflow.

Ray Tune's own callbacks tell them of trials (`cluster/tune/trackers.py`), transformers' own of fine-tunes
(`tracked_finetune`). Where a tracker is and who may write there is said by its own environment variables where the
command is given; workers get them from there, and nothing of them is recorded or logged. Every trial and fine-tune has
a row with a name that stays, so one that goes on after an interruption goes on in its own row. A tracker that cannot be
told any more stops nothing: the run folder has it all.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qpruner.errors import UserError

logger = logging.getLogger(__name__)

Kind = Literal["trial", "fine-tune"]

ROW, KIND = "qpruner.row", "qpruner.kind"
"""MLflow's tags with a row's name that stays, and with what it is."""
PREFIXES = ("WANDB_", "MLFLOW_", "DATABRICKS_")
DEFAULTS = {
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Where the environment does not say otherwise: nothing is printed over the live view, nothing is reported on the user,
and a server that is away is waited for half a minute while a search stands still, not for minutes."""


@dataclass(frozen=True)
class Trackers:
    """Who is told of one run.

    Attributes:
        names: `wandb`, `mlflow`.
        run: The run folder's name, for people.
        run_id: The run folder's own, for names that stay.
        folder: Where `wandb` keeps its files, unless WANDB_DIR says so.
        environment: The trackers' variables, keys among them: never shown.
    """

    names: tuple[str, ...]
    run: str
    run_id: str
    folder: Path
    environment: Mapping[str, str] = field(repr=False)

    @property
    def tracking_uri(self) -> str:
        """Where MLflow is."""
        return self.environment["MLFLOW_TRACKING_URI"]

    @property
    def experiment(self) -> str:
        """MLflow's experiment."""
        return self.environment.get("MLFLOW_EXPERIMENT_NAME", self.run)

    def row(self, kind: Kind, name: object) -> str:
        """The name that stays of a row."""
        return f"{self.run_id}-{kind}-{name}"

    def wandb_settings(self, kind: Kind) -> dict[str, Any]:
        """What `wandb.init` is told of every row."""
        return {
            "project": self.environment.get("WANDB_PROJECT", "qpruner"),
            "group": self.run,
            "job_type": kind,
            "dir": self.environment.get("WANDB_DIR", str(self.folder)),
            "resume": "allow",
        }


def check_trackers(names: tuple[str, ...]) -> dict[str, str]:
    """Refuse now, not after pruning, a tracker that cannot be told; returns the trackers' variables.

    Raises:
        UserError: For a package that is not installed, or a tracker that no variable leads to or that does not answer.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'`trackers` names {name}, which is not installed: run `pip install "qpruner[{name}]"`, or leave it out'
            )
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
    keys = {name: key for each in names for name, key in CHECKS[each]().items()}
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)} | keys


def _check_wandb() -> dict[str, str]:
    """The key of whoever has logged in here, for workers elsewhere."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return {}
    import wandb

    key = wandb.api.api_key
    if not key:
        raise UserError(
            "`trackers` names wandb, and there is no key for it: set WANDB_API_KEY, use `wandb login`, or set "
            "WANDB_MODE=offline"
        )
    return {"WANDB_API_KEY": key}


def _check_mlflow() -> dict[str, str]:
    from mlflow import MlflowClient

    place = os.environ.get("MLFLOW_TRACKING_URI")
    if not place:
        raise UserError(
            "`trackers` names mlflow, and MLFLOW_TRACKING_URI does not say where it is: set it to the address of a "
            "server, or to a file that all machines see, such as sqlite:////shared/mlflow.db"
        )
    try:
        MlflowClient(tracking_uri=place).search_experiments(max_results=1)
    except Exception as error:  # of sqlalchemy, of requests, of its own
        raise UserError(
            f"`trackers` names mlflow, and MLFLOW_TRACKING_URI, {without_key(place)}, does not work: {_told(error)}; "
            "see that it is right and the server is up, or leave mlflow out"
        ) from error
    return {}


CHECKS: dict[str, Callable[[], dict[str, str]]] = {"wandb": _check_wandb, "mlflow": _check_mlflow}


def without_key(text: str) -> str:
    """A text without what the URIs in it say of their user."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def _told(error: Exception) -> str:
    return without_key((str(error).strip().splitlines() or [type(error).__name__])[0])


class Guard:
    """Runs what tells one tracker; after an error nothing more is told.

    Args:
        tracker: Its name.
        on_trouble: Told of the error.
    """

    def __init__(self, tracker: str, on_trouble: Callable[[str], None]) -> None:
        self._tracker, self._on_trouble, self._is_over = tracker, on_trouble, False

    def tell(self, action: Callable[[], object]) -> None:
        """Run one thing."""
        if self._is_over:
            return
        try:
            action()
        except Exception as error:  # of another's code and server
            self._is_over = True
            text = f"{self._tracker} is not told any more: {_told(error)}; TensorBoard and the report have it all"
            logger.warning(text)
            self._on_trouble(text)


def mlflow_row(client: Any, experiment_id: str, row: str) -> str | None:
    """MLflow's own id of a row, if it has it already."""
    found = client.search_runs([experiment_id], filter_string=f"tags.`{ROW}` = '{row}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def mlflow_steps(client: Any, run_id: str, metric: str) -> frozenset[int]:
    """The steps at which a row has a metric."""
    return frozenset(each.step for each in client.get_metric_history(run_id, metric))
