"""Asks every node of the cluster what it is, before anything expensive."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpruner.cluster import node_facts
from qpruner.cluster.connect import size_of
from qpruner.cluster.slots import Node
from qpruner.cluster.tasks import first_line
from qpruner.runs.records import RUN_ID
from qpruner.runs.run_dir import BANK_CACHE, RunDir
from qpruner.runs.storage import CACHE, cache_root, storage_at

ANSWER_SECONDS = 120.0
"""A node starts a worker and answers within this time; importing torch from a cold network file system can take a
minute."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it."""

    kind: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Cache:
    """A node's folder for copies of the run's files."""

    variable: str  # of the environment, which names it
    folder: str
    disk: int  # id of its file system
    is_writable: bool
    free_bytes: int  # on its file system
    held_bytes: int  # of this run's files


@dataclass(frozen=True)
class NodeFacts:
    """A node's answer."""

    versions: dict[str, str]  # by package; qpruner's is a digest of its code
    storage: str  # why the run's storage cannot be used there, or empty
    caches: tuple[Cache, ...]
    has_hardware: bool  # a GPU driver, or a card without one
    gpus: tuple[Gpu, ...]  # that torch sees; empty where Ray counts none
    gpu_trouble: str  # why they cannot quantize, or empty


@dataclass(frozen=True)
class Report:
    """One node and its answer."""

    id: str  # Ray's
    name: str  # for people
    size: Node
    facts: NodeFacts | None
    silence: str = ""  # why it did not answer
    has_left: bool = False  # meanwhile


def probe(storage: Path, driver: str, banked: Iterable[str] = (), seconds: float = ANSWER_SECONDS) -> list[Report]:
    """Ask every live node of the cluster that this process has joined.

    Args:
        storage: A folder in the run's storage; every node writes a file there that is named by its id and holds it.
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
    if not storage_at(storage).fills_this_disk:
        caches[CACHE] = [f"{storage.parent.relative_to(cache_root())}/**/*"]
    asked = _ask(nodes, storage, driver, caches)
    answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
    answers: dict[str, NodeFacts | str] = {}
    left: set[str] = set()
    for node_id, reference in asked.items():
        if reference not in answered:
            ray.cancel(reference, force=True)
            answers[node_id] = f"no answer in {seconds:g} s"
            continue
        try:
            answers[node_id] = _facts(ray.get(reference))
        except RayError as error:
            answers[node_id] = first_line(getattr(error, "cause", None) or error)
            if isinstance(error, NodeDiedError | TaskUnschedulableError):
                # This can be known before the table of nodes says so.
                left.add(node_id)
    staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - left
    return [_report(node, answers[node["NodeID"]], node["NodeID"] not in staying) for node in nodes]


def packed_check(run: RunDir) -> bytes:
    """Pickle a function that a worker calls before it imports qpruner, which may be another one on a node.

    It raises a RuntimeError that names node and difference, see `node_facts.check_like`.
    """
    args = (node_facts.versions(), str(run.root), run.place, RUN_ID, run.id)
    return _packed(functools.partial(node_facts.check_like, *args))


def packed_check_of_installation() -> bytes:
    """Pickle the same for work that writes nothing to a run's storage."""
    return _packed(functools.partial(node_facts.check_installed, node_facts.versions()))


def packed_check_of_gpus() -> bytes:
    """Pickle the same for a run on this machine alone."""
    return _packed(node_facts.check_gpus)


def _packed(check: Callable[[], None]) -> bytes:
    from ray import cloudpickle

    with _module_by_value():
        packed: bytes = cloudpickle.dumps(check)
    return packed


@contextmanager
def _module_by_value() -> Iterator[None]:
    """Make what is pickled inside contain the module `node_facts`."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(node_facts)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(node_facts)


def _ask(
    nodes: list[dict[str, Any]], storage: Path, driver: str, caches: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Start a task on every node; returns references to the answers by node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {}
    with _module_by_value():
        # A process of its own, which ends with what importing torch took of a GPU.
        task = ray.remote(num_cpus=0, max_calls=1, max_retries=1)(node_facts.node_facts_here)
        for node in nodes:
            node_id, has_gpus = node["NodeID"], size_of(node).gpus > 0
            there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
            asked[node_id] = there.remote(str(storage), driver, node_id, caches, has_gpus)
    return asked


def _facts(answer: dict[str, Any]) -> NodeFacts:
    caches, gpus = (Cache(**cache) for cache in answer["caches"]), (Gpu(**gpu) for gpu in answer["gpus"])
    return NodeFacts(**{**answer, "caches": tuple(caches), "gpus": tuple(gpus)})


def _report(node: dict[str, Any], answer: NodeFacts | str, has_left: bool) -> Report:
    node_id, size = node["NodeID"], size_of(node)
    name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node_id[:8]})"
    if isinstance(answer, NodeFacts):
        return Report(node_id, name, size, answer)
    return Report(node_id, name, size, None, answer, has_left)
