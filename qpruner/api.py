"""Run the stages from scripts and notebooks, and read runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qpruner.report.snapshot import Snapshot


def run(
    config: str | Path, *overrides: str, until: str = "report", address: str | None = None
) -> Snapshot:
    """Start or continue the run of a configuration file, as `qpruner run` does.

    An override is `section.key=value`, `until` the last stage, `address` a Ray cluster to join.
    Returns a snapshot of the run's folder. Raises UserError if the input is invalid, StageError if
    a stage fails.
    """
    from qpruner.config.load import load_config
    from qpruner.errors import UserError
    from qpruner.pipeline.flow import STAGES
    from qpruner.runs.logs import logging_to, quiet_libraries

    verbs = {stage.name: stage.name if stage.help else "run" for stage in STAGES}
    if until not in verbs:
        raise UserError(f"`until` must be one of {', '.join(verbs)}, got {until!r}")
    if not isinstance(config, str | Path):
        raise UserError(
            f"`config` must be the path of a YAML file, got {type(config).__name__}: keys are "
            "overrides"
        )
    loaded = load_config(Path(config), list(overrides))
    quiet_libraries()
    from qpruner.cli.terminal import Terminal
    from qpruner.pipeline.run import run as run_flow
    from qpruner.runs.storage import run_root

    # The process's own command line may be that of a notebook.
    options = [part for each in overrides for part in ("--set", each)] + (
        ["--address", address] if address else []
    )
    with logging_to(run_root(loaded.output)), Terminal(quiet=False) as terminal:
        run_flow(
            loaded,
            terminal.emit,
            address,
            until,
            shlex.join(["qpruner", verbs[until], str(config), *options]),
        )
    return read_run(loaded.output)


def read_run(folder: str | Path) -> Snapshot:
    """Return a snapshot of a run folder, complete or not.

    Raises UserError if the folder holds no run.
    """
    from qpruner.report.snapshot import read_snapshot
    from qpruner.runs.run_dir import RunDir

    return read_snapshot(RunDir(folder, create=False))
