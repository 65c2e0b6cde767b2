"""Which machines work can count on."""

from __future__ import annotations

import re
import socket
from contextlib import suppress

import ray
from ray._private.state import state
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qpruner.models.memory import kernel_kills

ANSWER_SECONDS = 2.0
"""A machine that takes no connection for this long is taken for gone."""
KERNEL_SECONDS = 20.0
"""A machine that was out of memory a moment ago has to start a process to answer."""


def node_in(error: str) -> str | None:
    """Ray's id of the machine of the actor that an error names, dead or alive; None where it names none.

    A worker that dies young has told nothing itself: not where it was either. Ray (2.60) says `actor_id: ID` of one
    that is dead, and `The actor ID is unavailable` where a connection breaks before it knows.
    """
    found = re.search(r"\bactor(?:_id[:=])? ?([0-9a-f]{32})\b", error)
    table = state.actor_table(found[1]) if found else {}
    return table.get("Address", {}).get("NodeID") or None


def kernel_kills_on(node_id: str) -> int | None:
    """What a node's kernel says by now, as in `kernel_kills`; None where nobody there answers."""
    place = NodeAffinitySchedulingStrategy(node_id, soft=False)
    asked = ray.remote(num_cpus=0, max_retries=0)(kernel_kills).options(scheduling_strategy=place).remote()
    with suppress(RayError):
        kills: int | None = ray.get(asked, timeout=KERNEL_SECONDS)
        return kills
    return None


def stays(node_id: str) -> bool:
    """Whether a node lives and is not about to go (a spot notice, `ray drain-node`).

    Where Ray believes that it lives, it is asked for a connection: the workers of a raylet that was killed end up to
    5 s after it, and Ray takes it for dead up to 10 s later still (measured, Ray 2.60).
    """
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    if node is None or not node["Alive"] or node_id in state.get_draining_nodes():
        return False
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
