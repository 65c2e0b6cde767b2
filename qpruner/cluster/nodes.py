"""Asks about single machines of the cluster."""

from __future__ import annotations

import re
import socket
from contextlib import suppress

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qpruner.cluster import ray_private
from qpruner.models.memory import kernel_kills

ANSWER_SECONDS = 2.0
"""A machine that takes no connection for this long counts as gone."""
KERNEL_SECONDS = 20.0
"""A machine that was out of memory a moment ago has to start a process to answer."""


def node_of_actor(error: str) -> str | None:
    """Return Ray's id of the machine of the actor that an error names, dead or alive; None where it names none.

    Ray (2.60) says `actor_id: ID` of a dead actor, and `The actor ID is unavailable` where a connection breaks first.
    """
    found = re.search(r"\bactor(?:_id[:=])? ?([0-9a-f]{32})\b", error)
    table = ray_private.state.actor_table(found[1]) if found else {}
    return table.get("Address", {}).get("NodeID") or None


def kernel_kills_on(node_id: str) -> int | None:
    """Count the processes that a node's kernel has killed for memory; None where nobody there answers."""
    place = NodeAffinitySchedulingStrategy(node_id, soft=False)
    asked = ray.remote(num_cpus=0, max_retries=0)(kernel_kills).options(scheduling_strategy=place).remote()
    with suppress(RayError):
        kills: int | None = ray.get(asked, timeout=KERNEL_SECONDS)
        return kills
    return None


def is_staying(node_id: str) -> bool:
    """Return whether a node is alive and not about to go (a spot notice, `ray drain-node`).

    It is also asked for a connection: workers of a raylet that was killed end up to 5 s after it, and Ray takes it for
    dead up to 10 s later still (measured, Ray 2.60).
    """
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    if node is None or not node["Alive"] or node_id in ray_private.state.get_draining_nodes():
        return False
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
