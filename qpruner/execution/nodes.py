"""Which machines work can count on."""

from __future__ import annotations

import socket

import ray
from ray._private.state import state

ANSWER_SECONDS = 2.0
"""A machine that takes no connection for this long is taken for gone."""


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
