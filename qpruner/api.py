"""The flow and its stages as functions, for scripts and notebooks: each does what the verb of its name does.

They go on with what is recorded, log to the run's `qpruner.log`, tell on stdout how far they are, and return what the
run folder then tells. They are no names of the package itself, whose `search`, `finetune` and others are modules.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qpruner.report.snapshot import Snapshot


def run(config: str | Path, *overrides: str, until: str = "report", address: str | None = None) -> Snapshot:
    """Run a configuration, or go on with it, as `qpruner run` does.

    Args:
        config: Path of a YAML file.
        overrides: `section.key=value` pairs.
        until: The last stage to run: prepare, prune, bank, sensitivity, search, finetune, evaluate, comparison
            (with `finetune.compare`) or report.
        address: A running Ray cluster to join; without it Ray starts on this machine when it is needed.

    Returns:
        What the run's folder tells: records, trials, `to_dataframe()`.

    Raises:
        UserError: When the input cannot work.
        StageError: When a stage cannot go on.
    """
    from qpruner.config.load import load_config
    from qpruner.errors import UserError
    from qpruner.runs.logs import logging_to, quiet_libraries
    from qpruner.runs.records import STAGES

    if until not in STAGES:
        raise UserError(f"`until` must be one of {', '.join(STAGES)}, got {until!r}")
    if not isinstance(config, str | Path):
        raise UserError(
            f"`config` must be the path of a YAML file, got {type(config).__name__}; keys can be given beside it: "
            "run('my.yaml', 'search.max_trials=8')"
        )
    loaded = load_config(Path(config), list(overrides))
    quiet_libraries()
    from qpruner.cli.terminal import Terminal
    from qpruner.pipeline import run as run_stages
    from qpruner.runs.storage import run_root

    # In a notebook the process's own command line says nothing.
    options = [*(part for each in overrides for part in ("--set", each)), *(["--address", address] if address else [])]
    command = shlex.join(["qpruner", "run" if until == "report" else until, str(config), *options])
    with logging_to(run_root(loaded.output)), Terminal(quiet=False) as terminal:
        run_stages(loaded, terminal.emit, address, until, command)
    return read_run(loaded.output)


def prepare(config: str | Path, *overrides: str, address: str | None = None) -> Snapshot:
    """`run` up to the base model in a folder and the encoded data; `results.prepare` tells of both."""
    return run(config, *overrides, until="prepare", address=address)


def prune(config: str | Path, *overrides: str, address: str | None = None) -> Snapshot:
    """`run` up to the pruned checkpoint, RUN/prune; `results.prune` tells what was kept."""
    return run(config, *overrides, until="prune", address=address)


def bank(config: str | Path, *overrides: str, address: str | None = None) -> Snapshot:
    """`run` up to the bank of packed weights and adapter starts; `results.bank` tells of it."""
    return run(config, *overrides, until="bank", address=address)


def sensitivity(config: str | Path, *overrides: str, address: str | None = None) -> Snapshot:
    """`run` up to the sensitivities; `results.sensitivity` has the scores of every method and group."""
    return run(config, *overrides, until="sensitivity", address=address)


def search(config: str | Path, *overrides: str, address: str | None = None) -> Snapshot:
    """`run` up to the precision search; `best_plan` is the winner's, `results.search` and `trials` tell the rest."""
    return run(config, *overrides, until="search", address=address)


def finetune(config: str | Path, *overrides: str, address: str | None = None) -> Snapshot:
    """`run` up to the final model, RUN/final; `results.finetune` tells the winner's losses."""
    return run(config, *overrides, until="finetune", address=address)


def evaluate(config: str | Path, *overrides: str, address: str | None = None) -> Snapshot:
    """`run` up to the held-out evaluation; `results.evaluate` tells the scores of the winner, and of
    the model before any fine-tune."""
    return run(config, *overrides, until="evaluate", address=address)


def read_run(folder: str | Path) -> Snapshot:
    """What is recorded in a run's folder, whole or not.

    Raises:
        UserError: If it holds no run.
        CorruptFile: If a record cannot be read.
    """
    from qpruner.report.snapshot import read_snapshot
    from qpruner.runs.run_dir import RunDir

    return read_snapshot(RunDir(folder, create=False))
