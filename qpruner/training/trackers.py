"""Settings and checks of the trackers that the key `trackers` names: Weights & Biases and MLflow.

A tracker's address and key come from environment variables, which workers get, and which are never
recorded.
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
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Defaults of environment variables: the trackers print nothing over the live view, send no reports
about the user, and wait half a minute, not several, for a server that does not answer."""


@dataclass(frozen=True)
class Trackers:
    """The trackers of one run."""

    names: tuple[str, ...]  # `wandb`, `mlflow`
    run: str  # the run folder's name
    folder: Path  # where `wandb` keeps its files, unless WANDB_DIR is set
    environment: Mapping[str, str] = field(
        repr=False
    )  # the trackers' variables, keys among them: never shown

    @property
    def tracking_uri(self) -> str:
        """The address of MLflow."""
        return self.environment["MLFLOW_TRACKING_URI"]

    @property
    def experiment(self) -> str:
        """The name of MLflow's experiment."""
        return self.environment.get("MLFLOW_EXPERIMENT_NAME", self.run)

    def wandb_settings(self, kind: str) -> dict[str, Any]:
        """Return the arguments of `wandb.init` for all runs of a kind (`trial` or `fine-tune`)."""
        return {
            "project": self.environment.get("WANDB_PROJECT", "qpruner"),
            "group": self.run,
            "job_type": kind,
            "dir": self.environment.get("WANDB_DIR", str(self.folder)),
        }


def check_trackers(names: tuple[str, ...]) -> dict[str, str]:
    """Check that all trackers are installed and configured, and MLflow answers; return their
    environment variables."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'`trackers` names {name}, which is not installed: run `pip install "qpruner[{name}]"` or remove {name}'
            )
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
    if "mlflow" in names:
        _check_mlflow()
    keys = _wandb_key() if "wandb" in names else {}
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)} | keys


def _wandb_key() -> dict[str, str]:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return {}
    import wandb

    if key := wandb.api.api_key:
        return {
            "WANDB_API_KEY": key
        }  # workers on other machines need the key of this machine's login
    remedy = "set WANDB_API_KEY or WANDB_MODE=offline, or run `wandb login`"
    raise UserError(f"`trackers` names wandb, but there is no API key: {remedy}")


def _check_mlflow() -> None:
    from mlflow import MlflowClient

    if not (place := os.environ.get("MLFLOW_TRACKING_URI")):
        remedy = "set it to the address of a server, or to a database file that all machines see (sqlite:////FILE)"
        raise UserError(f"`trackers` names mlflow, but MLFLOW_TRACKING_URI is not set: {remedy}")
    try:
        MlflowClient(tracking_uri=place).search_experiments(max_results=1)
    except Exception as error:  # may come from sqlalchemy, requests or mlflow
        why = _without_password(f"MLFLOW_TRACKING_URI, {place}, does not work: {first_line(error)}")
        raise UserError(
            f"`trackers` names mlflow, but {why}; check the address and the server"
        ) from error


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", text)


class Guard:
    """Stops logging to a tracker after its first error, and passes a message to `on_error`."""

    def __init__(self, tracker: str, on_error: Callable[[str], None]) -> None:
        self._tracker, self._on_error, self._has_failed = tracker, on_error, False

    def run(self, action: Callable[[], object]) -> None:
        """Run an action unless an earlier one has failed."""
        if self._has_failed:
            return
        try:
            action()
        except Exception as error:  # the tracker's package or server may raise anything
            self._has_failed = True
            why = _without_password(first_line(error))
            text = f"logging to {self._tracker} has stopped: {why}; TensorBoard and the report have all figures"
            logger.warning(text)
            self._on_error(text)
