"""Every node of the cluster is asked what it is, before anything expensive."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpruner.cluster import testimony
from qpruner.cluster.cluster import first_line, size_of
from qpruner.cluster.slots import Node
from qpruner.runs.records import RUN_ID
from qpruner.runs.run_dir import BANK_CACHE, RunDir
from qpruner.runs.storage import storage_at

ANSWER_SECONDS = 120.0
"""A node starts a worker and answers within this time, or is named as silent; importing torch from a cold network file
system can take a minute."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it."""

    kind: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Cache:
    """A node's folder for copies of the run's files, and the room there.

    Attributes:
        variable: Of the environment, which names it.
        folder: Where it is.
        disk: What tells its file system from the node's others.
        is_writable: Whether it can be written.
        free_bytes: On its file system.
        held_bytes: Of this run's files, by those that are there.
    """

    variable: str
    folder: str
    disk: int
    is_writable: bool
    free_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class NodeFacts:
    """What a node said.

    Attributes:
        versions: By package; qpruner's is a digest of its code.
        storage: Why the run's storage cannot be used from there; empty where it can.
        caches: Its own folders for the bank's files and, of a run at a URI, for the pruned model.
        has_hardware: Whether there is a driver for GPUs, or a card that lacks one.
        gpus: What torch sees; not looked for where Ray counts none.
        gpu_trouble: Why they cannot quantize; empty where they can.
    """

    versions: dict[str, str]
    storage: str
    caches: tuple[Cache, ...]
    has_hardware: bool
    gpus: tuple[Gpu, ...]
    gpu_trouble: str


@dataclass(frozen=True)
class Report:
    """One node.

    Attributes:
        id: Ray's.
        name: For people.
        size: The CPUs and GPUs that Ray counts there.
        facts: What it said.
        silence: Why it said nothing.
        has_left: It was in the cluster when it was asked, and no longer is.
    """

    id: str
    name: str
    size: Node
    facts: NodeFacts | None
    silence: str = ""
    has_left: bool = False


def probe(storage: Path, driver: str, banked: Iterable[str] = (), seconds: float = ANSWER_SECONDS) -> list[Report]:
    """Ask every live node; this process has joined the cluster.

    Args:
        storage: A folder in the run's storage; every node leaves a file there, named by its id, that holds that id.
        driver: Name and content of the driver's own file there.
        banked: sha256 of the files of the run's bank, as far as it has one.
        seconds: How long to wait for answers.

    Returns:
        The nodes, in Ray's order.
    """
    import ray
    from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError

    nodes = [node for node in ray.nodes() if node["Alive"]]
    caches = {BANK_CACHE: [f"{sha256}.safetensors" for sha256 in banked]}
    caches |= storage_at(storage.parent).copies()
    asked = _ask(nodes, storage, driver, caches)
    answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
    said: dict[str, NodeFacts | str] = {}
    left: set[str] = set()
    for node_id, reference in asked.items():
        if reference not in answered:
            ray.cancel(reference, force=True)
            said[node_id] = f"no answer in {seconds:g} s"
            continue
        try:
            said[node_id] = _facts(ray.get(reference))
        except RayError as error:
            said[node_id] = first_line(getattr(error, "cause", None) or error)
            if isinstance(error, NodeDiedError | TaskUnschedulableError):
                # This can be known before the table of nodes says so.
                left.add(node_id)
    staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - left
    return [_report(node, said[node["NodeID"]], node["NodeID"] not in staying) for node in nodes]


def packed_check(run: RunDir) -> bytes:
    """A pickled function that a worker calls before it reads anything of qpruner's: that may be another one on a node
    that was not looked at. It raises a RuntimeError that names node and difference, see `testimony.check_like`."""
    told = (testimony.versions(), str(run.root), run.place, RUN_ID, run.id)
    return _packed(functools.partial(testimony.check_like, *told))


def packed_check_of_installation() -> bytes:
    """As `packed_check`, for work that leaves nothing in a run's storage."""
    return _packed(functools.partial(testimony.check_installed, testimony.versions()))


def packed_check_of_gpus() -> bytes:
    """As `packed_check`, where all work is done on this machine."""
    return _packed(testimony.check_gpus)


def _packed(check: Callable[[], None]) -> bytes:
    from ray import cloudpickle

    with _sent_whole():
        packed: bytes = cloudpickle.dumps(check)
    return packed


@contextmanager
def _sent_whole() -> Iterator[None]:
    """What is pickled meanwhile brings the module `testimony` along."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(testimony)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(testimony)


def _ask(
    nodes: list[dict[str, Any]], storage: Path, driver: str, caches: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The answers to come, by node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with _sent_whole():
        # A process of its own, which ends with what importing torch took of a GPU.
        task = ray.remote(num_cpus=0, max_calls=1, max_retries=1)(testimony.testify)
        asked = {}
        for node in nodes:
            there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            has_gpus = size_of(node).gpus > 0
            asked[node["NodeID"]] = there.remote(str(storage), driver, node["NodeID"], caches, has_gpus)
        return asked


def _facts(answer: dict[str, Any]) -> NodeFacts:
    caches, gpus = (Cache(**cache) for cache in answer["caches"]), (Gpu(**gpu) for gpu in answer["gpus"])
    return NodeFacts(**{**answer, "caches": tuple(caches), "gpus": tuple(gpus)})


def _report(node: dict[str, Any], said: NodeFacts | str, has_left: bool) -> Report:
    node_id, size = node["NodeID"], size_of(node)
    name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node_id[:8]})"
    if isinstance(said, NodeFacts):
        return Report(node_id, name, size, said)
    return Report(node_id, name, size, None, said, has_left)
