"""Work of several processes at once, one on each of several slots: the only module that imports Ray Train.

Ray Train starts the processes, on one node or on several, and connects them by torch's process group; the function they
run finds that group up. Ray Train restores nothing: what is run again goes on from what the function itself has saved.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Set before Ray Train is imported: its second API alone returns what the function returned; paths stay relative to
# where the driver is.
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"

import psutil
import ray
from ray import cloudpickle
from ray.exceptions import NodeDiedError, RayActorError, RayTaskError
from ray.train import ControllerError, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from qpruner.cluster.cluster import Result, run_tasks
from qpruner.cluster.nodes import stays
from qpruner.runs.storage import read_progress, write_progress


@dataclass(frozen=True)
class _Group:
    """What one group runs, and where."""

    function: Callable[[Any], Any]
    job: Any
    resources: Mapping[str, float]
    num_workers: int
    scratch: Path
    check_node: bytes


def run_groups(
    function: Callable[[Any], Result],
    jobs: Sequence[Any],
    resources: Mapping[str, float],
    num_workers: int,
    max_concurrent: int,
    scratch: Path,
    check_node: bytes,
    on_tick: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda position: None,
) -> Iterator[tuple[int, Result]]:
    """Run `function(job)` for every job in a group of processes; as `run_tasks`, with several processes a job.

    When one of them dies, its group ends and the job is run again in another.

    Args:
        function: A module-level function that every process of a group calls.
        jobs: Its arguments.
        resources: Ray resources of one process.
        num_workers: Processes of a group.
        max_concurrent: Groups in flight.
        scratch: Folder that all nodes see, for Ray Train; gone at the end.
        check_node: As of `run_tasks`.
        on_tick: Called about once a second while groups run.
        progress: As of `run_tasks`.

    Yields:
        Position of the job and what its group's first process returned, as they finish. An error of any process is
        raised as it was.

    Raises:
        WorkerDied: If a job's groups lose a process again and again, on machines that live on and without progress.
    """
    groups = [_Group(function, job, resources, num_workers, scratch, check_node) for job in jobs]
    # What waits for a group holds no slot.
    held = {"cpu": 0.0}
    try:
        yield from run_tasks(
            _run, groups, held, max_concurrent, fresh=True, check_node=check_node, on_tick=on_tick, progress=progress
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(group: _Group) -> Any:
    names = {"cpu": "CPU", "gpu": "GPU"}
    # Of its own: under a name that it knows, Ray Train would go on from its own records.
    name = uuid.uuid4().hex
    group.scratch.mkdir(parents=True, exist_ok=True)
    places = group.scratch / f"{name}.nodes"
    trainer = TorchTrainer(
        partial(group.function, group.job),
        torch_config=_Connection(),
        scaling_config=ScalingConfig(
            num_workers=group.num_workers,
            use_gpu=bool(group.resources.get("gpu")),
            resources_per_worker={names[name]: amount for name, amount in group.resources.items()},
        ),
        run_config=RunConfig(name=name, storage_path=str(group.scratch), callbacks=[_Watch(places, group.check_node)]),
    )
    try:
        return trainer.fit().return_value
    except WorkerGroupError as error:
        cause = _first_cause(error.worker_failures)
        if isinstance(cause, RayActorError) and not all(map(stays, (read_progress(places) or "").split())):
            raise NodeDiedError(str(cause)) from error
        raise cause from error
    except ControllerError as error:
        raise error.controller_failure from error


class _Watch(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Checks the machines of a group's processes before these are sent anything, and tells where they are.

    Gives the group's slots back at the end of all; Ray Train (2.60) keeps those of one that lost a process just before
    its function began, and whoever comes next waits for them for ever.

    Args:
        places: File for Ray's ids of their machines.
        check_node: As of `run_tasks`.
    """

    def __init__(self, places: Path, check_node: bytes) -> None:
        self._places, self._check_node = places, check_node
        self._state: Any = None

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """With its context Ray Train (2.60) sends a process this class, which another qpruner may not have."""
        check = cloudpickle.loads(self._check_node)
        try:
            ray.get([worker.actor.execute.remote(check) for worker in workers])
        except RayTaskError as error:
            raise WorkerGroupError(str(error.cause), {0: error.cause}) from error
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._state = worker_group.get_worker_group_state()
        write_progress(self._places, " ".join(worker.metadata.node_id for worker in self._state.workers))

    async def before_controller_shutdown(self) -> None:
        if self._state is not None:
            self._state.shutdown()


def _first_cause(failures: Mapping[int, Exception]) -> Exception:
    """The failure that the others follow from: a death, or what a process raised of itself; who waits for a process
    that is gone only sees its connection end. Connections that end of themselves count as a death."""
    causes: list[Exception] = [getattr(failure, "health_check_failure", failure) for failure in failures.values()]
    died = [cause for cause in causes if isinstance(cause, RayActorError)]
    own = [cause for cause in causes if not (type(cause).__name__ == "DistBackendError" or "/gloo/" in str(cause))]
    told: list[Exception] = [*died, *own, RayActorError(error_msg=str(causes[0]))]
    return told[0]


class _Connection(TorchConfig):  # type: ignore[misc]
    """Torch's process group, over the interface that has the node's address in the cluster."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        try:
            worker_group.execute(_choose_interface)
            super().on_start(worker_group, backend_config)
        except Exception as error:
            # Here, too, the slots would be kept; as any other death this one is told to whoever counts them.
            worker_group.get_worker_group_state().shutdown()
            raise WorkerGroupError(str(error), {0: error}) from error


def _choose_interface() -> None:
    """Loopback where Ray runs on this machine alone; gloo would take what the host's name leads to."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in [each.address for each in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
