"""Several raylets on this machine, on loopback; their GPUs are counted, not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.cluster_utils import Cluster

from qpruner.execution.cluster import disconnect


@contextmanager
def cluster_of(*workers: dict[str, object]) -> Iterator[Cluster]:
    """A head that can run nothing, and worker nodes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for worker in workers:
            cluster.add_node(**worker)
        yield cluster
    finally:
        disconnect()
        cluster.shutdown()
