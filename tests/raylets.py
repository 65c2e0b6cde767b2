"""Raylets on loopback, each of them a node that tests can kill; GPUs exist only as numbers."""

import ctypes
import os
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


def raylet_of(node: Any) -> Any:
    """Return the process of a node's raylet."""
    return node.all_processes["raylet"][0].process


@dataclass
class Raylets:
    """A head without cores, and the living nodes for workers."""

    cluster: Any  # Ray's own
    nodes: list[Any] = field(default_factory=list)
    joined: Any = None  # the cluster as qpruner sees it, if this process has joined it

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, **resources: Any) -> Any:
        """Start a node with one core, or with the given arguments of `add_node` in Ray."""
        node = self.cluster.add_node(
            **{"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES} | resources
        )
        self.nodes.append(node)
        return node

    def in_a_thread(self) -> None:
        """Allow threads to add nodes: leave out the signal handler, which only the main thread can
        set."""
        self.cluster._shutdown_at_exit = False

    def add_apart(self, mounts: str, **resources: Any) -> Any:
        """Start a node with its own mounted file systems."""
        libc = ctypes.CDLL(None, use_errno=True)

        def start() -> Any:
            # A thread and the processes that it starts have their own mounts.
            if libc.unshare(CLONE_NEWNS):
                pytest.skip(f"mounting is not permitted here: {os.strerror(ctypes.get_errno())}")
            subprocess.run(["bash", "-ec", f"mount --make-rprivate /; {mounts}"], check=True)
            return self.add(**resources)

        self.in_a_thread()
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(start).result()

    def kill(self, node: Any) -> None:
        """Kill a raylet (SIGKILL); its workers notice within seconds and end."""
        raylet_of(node).kill()
        self.nodes.remove(node)

    def drain(self, node_id: str, seconds: float) -> None:
        """Announce to Ray that a node will end in some seconds.

        A cloud does so for spot instances.
        """
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, why_not = GcsClient(address=self.address).drain_node(
            node_id, reason, "spot notice", deadline
        )
        assert accepted, why_not

    def kill_machine(self, node: Any) -> None:
        """Kill a raylet and all processes that it has started (SIGKILL)."""
        workers = psutil.Process(raylet_of(node).pid).children(recursive=True)
        self.kill(node)
        for worker in workers:
            worker.kill()

    def kill_head(self) -> None:
        """Kill the control store, the raylet and all other processes of the head (SIGKILL)."""
        for started in self.cluster.head_node.all_processes.values():
            for each in started:
                each.process.kill()


@contextmanager
def raylets(number: int, **resources: Any) -> Iterator[Raylets]:
    """Run a head and some nodes with one core or the given resources, until the block ends."""
    import ray
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 0,
        "object_store_memory": OBJECT_STORE_BYTES,
        "node_ip_address": "127.0.0.1",
    }
    cluster = Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": False})
    try:
        found = Raylets(cluster)
        for _ in range(number):
            found.add(**resources)
        yield found
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def joined_raylets(number: int, **resources: Any) -> Iterator[Raylets]:
    """Run a head and some nodes as `raylets` does, joined by this process until the block ends."""
    from qpruner.cluster.connect import connect, disconnect

    with raylets(number, **resources) as found:
        found.joined = connect(found.address)
        yield found
        disconnect()
