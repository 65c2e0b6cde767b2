"""Which machines a trial can count on."""

from __future__ import annotations

import ray
from ray._private.state import state


def staying_nodes() -> set[str]:
    """Ids of the nodes that live and are not about to go (a spot notice, `ray drain-node`)."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]} - set(state.get_draining_nodes())
