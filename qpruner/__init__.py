"""qpruner: structured pruning and a searched mixed-precision plan for large language models.

In Python: `run` a configuration, `read_run` a folder; both give a `Snapshot` of what is recorded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qpruner.version import VERSION

if TYPE_CHECKING:
    from qpruner.report.snapshot import Snapshot

__version__ = VERSION


def run(config: str | Path, *overrides: str, until: str = "report", address: str | None = None) -> Snapshot:
    """Run a configuration, or go on with it, as `qpruner run` does.

    Args:
        config: Path of a YAML file.
        overrides: `section.key=value` pairs.
        until: The last stage to run.
        address: A running Ray cluster to join; without it Ray starts on this machine when it is needed.

    Returns:
        What the run's folder tells: records, trials, `to_dataframe()`.

    Raises:
        UserError: When the input cannot work.
        StageError: When a stage cannot go on.
    """
    from qpruner.config import load_config
    from qpruner.pipeline import run as run_stages
    from qpruner.terminal import Terminal

    loaded = load_config(Path(config), list(overrides))
    with Terminal(quiet=False) as terminal:
        run_stages(loaded, terminal.emit, address, until)
    return read_run(loaded.output)


def read_run(folder: str | Path) -> Snapshot:
    """What is recorded in a run's folder, whole or not.

    Raises:
        UserError: If it holds no run.
        CorruptFile: If a record cannot be read.
    """
    from qpruner.report.snapshot import read_snapshot
    from qpruner.rundir import RunDir

    return read_snapshot(RunDir(folder, create=False))
