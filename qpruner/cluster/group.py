"""Runs a function in several processes, which Ray Train connects to one torch process group.

No other module uses Ray Train. A group that runs again resumes from the files that the function
itself has saved.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Set before Ray Train is imported: only its second API returns the result of the function.
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths stay valid

import psutil
import ray
from ray import cloudpickle
from ray.exceptions import NodeDiedError, RayActorError, RayTaskError
from ray.train import ControllerError, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util import get_current_placement_group, remove_placement_group

from qpruner.cluster.ray_private import ControllerCallback, TorchBackend, WorkerGroupCallback
from qpruner.cluster.slots import Resources
from qpruner.cluster.tasks import Result, is_staying, run_tasks
from qpruner.runs.storage import read_progress, write_progress


def run_groups(
    function: Callable[[Any], Result],
    jobs: Sequence[Any],
    resources: Resources,
    num_workers: int,
    max_concurrent: int,
    scratch: Path,
    check_node: bytes,
    **more: Any,
) -> Iterator[tuple[int, Result]]:
    """Run `function(job)` for every job, each in a group of `num_workers` processes.

    If a process dies, the job runs again in another group. Rank 0 returns the result. Everything
    else is as in `run_tasks`.

    Args:
        function: A function of one job.
        jobs: The jobs.
        resources: CPUs and GPUs of one process of a group.
        num_workers: The number of processes in a group.
        max_concurrent: How many groups may run at once.
        scratch: A folder that all nodes share, for the files of Ray Train.
        check_node: The pickled check of a node (see `packed_check`).
        **more: Further arguments of `run_tasks`.
    """
    run = partial(
        _run,
        function,
        resources=resources,
        num_workers=num_workers,
        scratch=scratch,
        check_node=check_node,
    )
    try:
        yield from run_tasks(
            run,
            jobs,
            resources={"cpu": 0.0},  # the task that waits for a group reserves nothing
            max_concurrent=max_concurrent,
            own_process=True,
            check_node=check_node,
            **more,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(
    function: Callable[[Any], Any],
    job: Any,
    resources: Resources,
    num_workers: int,
    scratch: Path,
    check_node: bytes,
) -> Any:
    """Run one job in a group of processes; raise the error that ended the group."""
    # A new name: under a known name, Ray Train would resume from its own records.
    name = uuid.uuid4().hex
    scratch.mkdir(parents=True, exist_ok=True)
    nodes = scratch / f"{name}.nodes"
    trainer = TorchTrainer(
        partial(function, job),
        torch_config=_Connection(),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(resources.get("gpu")),
            resources_per_worker={name.upper(): amount for name, amount in resources.items()},
        ),
        run_config=RunConfig(
            name=name, storage_path=str(scratch), callbacks=[_GroupHooks(nodes, check_node)]
        ),
    )
    try:
        return trainer.fit().return_value
    except WorkerGroupError as error:
        cause = _first_cause(error.worker_failures)
        if isinstance(cause, RayActorError):
            node_ids = (read_progress(nodes) or "").split()
            if not all(is_staying(node_id) for node_id in node_ids):
                raise NodeDiedError(str(cause)) from error
        raise cause from error
    except ControllerError as error:
        raise error.controller_failure from error


class _GroupHooks(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Checks the nodes of a group before its function starts, and writes their ids to a file.

    If a process dies before the function starts, Ray Train (2.60) keeps the group's CPUs and GPUs,
    tries again and waits for them forever; so this class frees them.
    """

    def __init__(self, nodes: Path, check_node: bytes) -> None:
        self._nodes = nodes
        self._check_node = check_node
        self._placement_group: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """End the run where Ray Train would start the group again.

        This counts like any other death.
        """
        if self._placement_group:
            death = RayActorError(error_msg="a process died, or its machine leaves")
            raise WorkerGroupError("", {0: death})

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """Check the nodes before Ray Train (2.60) sends `self` to them.

        A node with another version of qpruner may lack the class of `self`.
        """
        check = cloudpickle.loads(self._check_node)
        group = workers[0].actor.execute.remote(get_current_placement_group)
        self._placement_group = ray.get(group)
        try:
            ray.get([worker.actor.execute.remote(check) for worker in workers])
        except RayTaskError as error:
            raise WorkerGroupError(str(error.cause), {0: error.cause}) from error
        write_progress(self._nodes, " ".join(worker.metadata.node_id for worker in workers))
        return {}

    async def before_controller_shutdown(self) -> None:
        if self._placement_group:
            remove_placement_group(self._placement_group)


def _first_cause(failures: Mapping[int, Exception]) -> Exception:
    """Return the failure that caused the others.

    It is the death of a process or, without one, an error that is no broken connection.
    """
    causes: list[Exception] = [
        getattr(failure, "health_check_failure", failure) for failure in failures.values()
    ]
    deaths: list[Exception] = [cause for cause in causes if isinstance(cause, RayActorError)]
    if deaths:
        return deaths[0]
    for cause in causes:
        is_connection = type(cause).__name__ == "DistBackendError" or "/gloo/" in str(cause)
        if not is_connection:
            return cause
    return RayActorError(error_msg=str(causes[0]))  # type: ignore[no-any-return]


class _Connection(TorchConfig):  # type: ignore[misc]
    """Connects the processes over the network interface with the node's address in the cluster."""

    @property
    def backend_cls(self) -> type[TorchBackend]:
        return _Backend


class _Backend(TorchBackend):  # type: ignore[misc]
    """Chooses the network interface, then lets torch connect the processes.

    An error counts like any other death.
    """

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        try:
            worker_group.execute(_choose_interface)
            super().on_start(worker_group, backend_config)
        except Exception as error:
            raise WorkerGroupError(str(error), {0: error}) from error


def _choose_interface() -> None:
    """Make gloo and NCCL use the interface with Ray's address.

    Gloo itself would use the address of the host's name.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
