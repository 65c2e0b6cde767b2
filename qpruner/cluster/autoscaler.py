"""How large Ray's autoscaler may make a cluster, read from its cluster file.

Ray has no API for it (2.60): `get_cluster_config` is None and nodes do not say their type. The head's monitor process
has the file's path on its command line. A driver that is not on the head, or on Kubernetes, sees only the machines that
have joined.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from qpruner.cluster.slots import Growth, Node
from qpruner.errors import UserError

OPTION = "--autoscaling-config="


def growth_of(session: str, head: Node) -> Growth | None:
    """Return how large the autoscaler of a Ray session may make it; None where there is no autoscaler.

    Raises:
        UserError: If the cluster file cannot be read.
    """
    files = [
        Path(argument.removeprefix(OPTION)).expanduser()
        for command in _commands()
        if any(f"/{session}/" in argument for argument in command)
        for argument in command
        if argument.startswith(OPTION)
    ]
    return read_growth(files[0], head) if files else None


def read_growth(file: Path, head: Node) -> Growth | None:
    """Return how large a cluster file lets the cluster become; types without a size count once they have joined.

    Raises:
        UserError: If it cannot be read.
    """
    # Ray's own reader (`FileConfigReader`) prints warnings and wants the ssh key that the file names.
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{file}, the cluster file of Ray's autoscaler, cannot be read ({error}): correct it, and run as the user "
            "who started Ray there"
        ) from error
    max_workers = int(config.get("max_workers", 0))
    workers: list[Node] = []
    for name, kind in (config.get("available_node_types") or {}).items():
        resources = kind.get("resources") or {}
        node = Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))
        number = kind.get("max_workers", 0 if name == config.get("head_node_type") else max_workers)
        workers += [node] * number if node.cpus or node.gpus else []
    return Growth(head, tuple(workers), max_workers) if workers else None


def _commands() -> Iterator[list[str]]:
    """Yield the command lines of this machine's processes."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            yield os.fsdecode((process / "cmdline").read_bytes()).split("\0")
