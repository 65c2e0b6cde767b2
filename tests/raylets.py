"""Several raylets on this machine, on loopback, each a node that can be killed; their GPUs are counted, not there."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

OBJECT_STORE_BYTES = 80 * 2**20
CLONE_NEWNS = 0x20000


@dataclass
class Raylets:
    """A head that can run nothing, and its workers' nodes that live."""

    cluster: Any  # Ray's own
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        address: str = self.cluster.address
        return address

    def add(self, **resources: Any) -> Any:
        """Start a node with what Ray's `add_node` is given, else one core."""
        node = self.cluster.add_node(**{"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES} | resources)
        self.nodes.append(node)
        return node

    def in_a_thread(self) -> None:
        """Let threads add nodes; only the main one may set the signal handler by which they end with this process."""
        self.cluster._shutdown_at_exit = False

    def add_apart(self, mounts: str, **resources: Any) -> Any:
        """Start a node that has other file systems than this machine."""
        libc = ctypes.CDLL(None, use_errno=True)

        def start() -> Any:
            # Mounts belong to a thread, and to what it starts.
            if libc.unshare(CLONE_NEWNS):
                pytest.skip(f"mounting is not permitted here: {os.strerror(ctypes.get_errno())}")
            subprocess.run(["bash", "-ec", f"mount --make-rprivate /; {mounts}"], check=True)
            return self.add(**resources)

        self.in_a_thread()
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(start).result()

    def kill(self, node: Any) -> None:
        """SIGKILL to a raylet; Ray's workers on its machine notice within seconds, and end."""
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        self.nodes.remove(node)

    def drain(self, node_id: str, seconds: float) -> None:
        """Tell Ray that a machine will be gone in so many seconds, as a cloud does before it takes a spot instance."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason, deadline = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), int((time.time() + seconds) * 1000)
        accepted, why_not = GcsClient(address=self.address).drain_node(node_id, reason, "spot notice", deadline)
        assert accepted, why_not

    def kill_machine(self, node: Any) -> None:
        """SIGKILL to a raylet and to all that it has started."""
        workers = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        self.kill(node)
        for worker in workers:
            worker.kill()

    def kill_head(self) -> None:
        """SIGKILL to the control store, the head's raylet and all that runs beside them."""
        for started in self.cluster.head_node.all_processes.values():
            for each in started:
                os.kill(each.process.pid, signal.SIGKILL)


@contextmanager
def raylets(number: int, **resources: Any) -> Iterator[Raylets]:
    """A head and this many nodes, each of one core or of these resources; all gone afterwards."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": False})
    try:
        found = Raylets(cluster)
        for _ in range(number):
            found.add(**resources)
        yield found
    finally:
        ray.shutdown()
        cluster.shutdown()
