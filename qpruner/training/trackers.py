"""Settings and checks of the trackers that the key `trackers` names: Weights & Biases and MLflow.

A tracker's address and key come from environment variables. Workers receive these variables, and
no file of the run holds them.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpruner.errors import UserError, first_line

logger = logging.getLogger(__name__)

PREFIXES = ("WANDB_", "MLFLOW_", "DATABRICKS_")
DEFAULTS = {
    "WANDB_PROJECT": "qpruner",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Defaults of environment variables.

The trackers print nothing over the live view and send no reports about the user. They wait half a
minute, not several, for a server that does not answer.
"""


@dataclass(frozen=True)
class Trackers:
    """The trackers of one run."""

    names: tuple[str, ...]
    """Any of `wandb` and `mlflow`."""
    run: str
    """The name of the run folder, which groups the run's rows."""
    environment: Mapping[str, str] = field(repr=False)
    """The variables that configure the trackers; never shown, because keys are among them."""


def trackers_of(names: tuple[str, ...], run: str, folder: Path) -> Trackers:
    """Check the trackers and collect their environment variables.

    Args:
        names: The trackers, `wandb` and `mlflow`.
        run: The name of the run, which is W&B's group and the default of MLflow's experiment.
        folder: Where `wandb` keeps its files unless WANDB_DIR is set.

    Raises:
        UserError: A tracker is not installed or not configured, or MLflow does not answer.
    """
    variables = check_trackers(names)
    of_run = {"WANDB_DIR": str(folder), "MLFLOW_EXPERIMENT_NAME": run}
    return Trackers(names, run, of_run | variables)


def check_trackers(names: tuple[str, ...]) -> dict[str, str]:
    """Check that all trackers are installed and configured, and return their variables.

    Raises:
        UserError: A tracker is not installed or not configured, or MLflow does not answer.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"`trackers` names {name}, which is not installed: run "
                f'`pip install "qpruner[{name}]"` or remove {name}'
            )
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)

    if "mlflow" in names:
        _check_mlflow()
    keys = _wandb_key() if "wandb" in names else {}
    variables = {name: text for name, text in os.environ.items() if name.startswith(PREFIXES)}
    return variables | keys


def _wandb_key() -> dict[str, str]:
    """Return the key of this machine's login, which workers on other machines need."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return {}
    import wandb

    key = wandb.api.api_key
    if not key:
        raise UserError(
            "`trackers` names wandb, but there is no API key: set WANDB_API_KEY or "
            "WANDB_MODE=offline, or run `wandb login`"
        )
    return {"WANDB_API_KEY": key}


def _check_mlflow() -> None:
    from mlflow import MlflowClient

    address = os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        raise UserError(
            "`trackers` names mlflow, but MLFLOW_TRACKING_URI is not set: set it to the address of "
            "a server, or to a database file that all machines see (sqlite:////FILE)"
        )
    try:
        MlflowClient(tracking_uri=address).search_experiments(max_results=1)
    except Exception as error:  # may come from sqlalchemy, requests or mlflow
        cause = _without_password(
            f"MLFLOW_TRACKING_URI, {address}, does not work: {first_line(error)}"
        )
        raise UserError(
            f"`trackers` names mlflow, but {cause}; check the address and the server"
        ) from error


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", text)


@dataclass
class Guard:
    """Stops logging to a tracker after its first error, and passes a message to `on_error`."""

    tracker: str
    on_error: Callable[[str], None]
    has_failed: bool = False

    def call(self, method: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Call a method with these arguments unless an earlier call has failed."""
        if self.has_failed:
            return
        try:
            method(*args, **kwargs)
        except Exception as error:  # the tracker's package or server may raise anything
            self.has_failed = True
            text = (
                f"logging to {self.tracker} has stopped: {_without_password(first_line(error))}; "
                "TensorBoard and the report have all figures"
            )
            logger.warning(text)
            self.on_error(text)
