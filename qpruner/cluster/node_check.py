"""Checks that nodes can work on a run: all of them before the run, and each one before its work.

The code of the checks is sent to the node, where another qpruner or none may be installed: it
imports nothing of qpruner, except to reach the storage, and returns plain data.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpruner.cluster.slots import Node, size_of
from qpruner.runs.records import RUN_ID
from qpruner.runs.run_dir import RunDir

# time for a node to answer; importing torch from a cold network file system can take a minute
ANSWER_SECONDS = 120.0
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
MISSING = "not installed"
REFUSAL = "NodeDiffers: "
"""The start of the error of an unusable node.

The error is a RuntimeError, because every qpruner can unpickle this type.
"""

Gpus = Sequence[tuple[str, int, tuple[int, int]]]
"""(model, bytes of memory, compute capability) of each GPU that torch can use."""


@dataclass(frozen=True)
class NodeReport:
    """The result of checking one node."""

    id: str  # of Ray
    name: str  # address, host name and start of the id
    size: Node
    problems: dict[str, str]  # sentences, by a short title
    gpus: Gpus = ()
    has_left: bool = False  # the node left the cluster during the check


def look_at_all(storage: Path, driver: str, seconds: float = ANSWER_SECONDS) -> list[NodeReport]:
    """Check every live node of the joined cluster.

    Args:
        storage: A folder of the run.
        driver: Name and content of a file that this process has written to that folder. Every node
            writes a file there, too; its name and content are the id of the node.
        seconds: How long to wait. A node that has not answered by then is reported with that
            problem.
    """
    import ray
    from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    own_versions = versions()
    answers = []
    with _module_by_value():
        # In a new process, which frees at its end the GPU memory that importing torch takes.
        task = ray.remote(num_cpus=0, max_calls=1, max_retries=1)(look_at_one)
        for node in nodes:
            node_id = node["NodeID"]
            on_node = task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            )
            num_gpus = size_of(node).gpus
            answers.append(on_node.remote(str(storage), driver, node_id, own_versions, num_gpus))
    ray.wait(answers, num_returns=len(answers), timeout=seconds)

    reports = []
    for node, answer in zip(nodes, answers, strict=True):
        gpus: Gpus = ()
        has_left = False
        try:
            problems, gpus = ray.get(answer, timeout=0)
        except (RayError, TimeoutError) as error:
            ray.cancel(answer, force=True)
            # These errors come before Ray's table says that the node has left.
            has_left = isinstance(error, NodeDiedError | TaskUnschedulableError)
            why = _first_line(error)
            if isinstance(error, TimeoutError):
                why = f"no answer in {seconds:g} s"
            remedy = "see Ray's log there, or take the node out of the cluster (`ray stop`)"
            problems = {"no answer": f"it could not be checked: {why}; {remedy}"}
        node_id = node["NodeID"]
        name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node_id[:8]})"
        report = NodeReport(
            id=node_id,
            name=name,
            size=size_of(node),
            problems=problems,
            gpus=gpus,
            has_left=has_left,
        )
        reports.append(report)
    return reports


def packed_check(driver_versions: Mapping[str, str], run: RunDir | None) -> bytes:
    """Pickle `check_node` for workers.

    Without versions it skips the versions, and without a run it skips the storage.
    """
    from ray import cloudpickle

    place = (str(run.root), run.place, RUN_ID, run.id) if run else None
    with _module_by_value():
        packed: bytes = cloudpickle.dumps(functools.partial(check_node, driver_versions, place))
    return packed


@contextlib.contextmanager
def _module_by_value() -> Iterator[None]:
    """Within this block, pickle functions of this module with their code, not by name."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


# ---- on a node


def look_at_one(
    storage: str, driver: str, node_id: str, driver_versions: Mapping[str, str], num_gpus: float
) -> tuple[dict[str, str], Gpus]:
    """Check this node, on which Ray counts `num_gpus` GPUs.

    Return the fields `problems` and `gpus` of `NodeReport`.
    """
    gpus: Gpus = ()
    gpu_trouble = ""
    if num_gpus:
        gpus, gpu_trouble = _gpus(num_gpus)
    differing = differences(driver_versions)
    if differing:
        differing += (
            "; install the same versions on every node "
            "(`launch/up.sh`, or `launch/setup.sh` there) and restart Ray"
        )
    problems = {
        "other versions": differing,
        "storage": _storage_trouble(Path(storage), driver, driver, node_id, seconds=0.0),
        "GPUs": gpu_trouble,
    }
    return {title: text for title, text in problems.items() if text}, gpus


def check_node(driver_versions: Mapping[str, str], place: tuple[str, str, str, str] | None) -> None:
    """Raise a RuntimeError if this node has other versions, no storage or no GPU.

    Its text is `NodeDiffers: NODE: reason`.

    Args:
        driver_versions: The versions of the driver (see `versions`); if empty, they are not
            compared.
        place: The folder of the run, its name in messages, and the name and content of a file in
            it; None to skip the storage.
    """
    trouble = differences(driver_versions)
    if place and not trouble:  # reading the storage needs the driver's qpruner
        folder, folder_name, file, text = place
        # This waits for the storage as long as a trial does.
        unreadable = _storage_trouble(Path(folder), file, text)
        if unreadable:
            trouble = f"`output`: {folder_name} {unreadable}"
    trouble = trouble or _unseen_gpus()
    if trouble:
        raise RuntimeError(f"{REFUSAL}{own_name()}: {trouble}")


def own_name() -> str:
    """Return the name of this node in messages: address, host name and start of its id."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    return f"{ray.util.get_node_ip_address()} ({platform.node()}, {node_id[:8]})"


def own_device() -> str:
    """Return the name of the GPU that Ray gave this process, followed by the name of the node.

    Without a GPU, return only the name of the node.
    """
    import ray

    gpus = ",".join(map(str, ray.get_gpu_ids()))
    return f"GPU {gpus} of {own_name()}" if gpus else own_name()


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes.

    Suffixes for a device, as in `2.13.0+cpu`, are left out.
    """
    python = ".".join(platform.python_version_tuple()[:2])
    own_versions = {"python": python, "qpruner's code": _code()}
    for name in PACKAGES:
        try:
            own_versions[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            own_versions[name] = MISSING
    return own_versions


def differences(driver_versions: Mapping[str, str]) -> str:
    """Describe the versions that differ between this node and the driver; empty if none does."""
    own_versions = versions() if driver_versions else {}
    return ", ".join(
        f"{name} is {own_versions[name]} there and {driver_version} here"
        for name, driver_version in driver_versions.items()
        if own_versions[name] != driver_version
    )


def _code() -> str:
    """Return a digest of qpruner's source files, as two checkouts of one version may differ."""
    spec = importlib.util.find_spec("qpruner")
    if spec is None or not spec.submodule_search_locations:
        return MISSING
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _unseen_gpus() -> str:
    """Return a message if torch sees no GPU although Ray gave this process one.

    The message is empty if the machine has no NVIDIA card, because Ray may count GPUs that do not
    exist.
    """
    import ray

    # `get_gpu_ids` would start a cluster in a process that is no worker.
    if not (ray.is_initialized() and ray.get_gpu_ids() and _has_hardware()):
        return ""
    import torch

    if torch.cuda.is_available():
        return ""
    return f"a GPU is reserved for work there, but torch {torch.__version__} sees none"


def _has_hardware() -> bool:
    """Return True if this machine has an NVIDIA driver or card.

    Ray may count GPUs that do not exist.
    """
    if Path("/proc/driver/nvidia/gpus").exists():  # containers may hide the cards
        return True
    nvidia = "0x10de"
    display = "0x03"
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            is_display = (device / "class").read_text().startswith(display)
            if is_display and (device / "vendor").read_text().strip() == nvidia:
                return True
    return False


def _gpus(counted: float) -> tuple[Gpus, str]:
    """Return the GPUs that torch sees, and a message if there is trouble with them.

    The message says that they are unusable, or fewer than Ray counts.
    """
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        os.environ.pop(name, None)  # Ray hides GPUs by these from tasks that reserve none
    seen = []
    try:
        import torch

        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            seen.append((gpu.name, gpu.total_memory, (gpu.major, gpu.minor)))
        if seen:
            from bitsandbytes.cextension import lib

            if not lib.compiled_with_cuda:
                library = torch.version.cuda or torch.version.hip
                raise RuntimeError(
                    f"bitsandbytes has no library for CUDA or ROCm {library}, which torch uses"
                )
    except (ImportError, OSError, RuntimeError) as error:
        why = f"{type(error).__name__}: {_first_line(error)}"
        remedy = "install a torch for its GPU driver there, and a bitsandbytes for this torch"
        return (), f"torch or bitsandbytes cannot use its GPUs: {why}; {remedy}"

    if len(seen) < counted and (seen or _has_hardware()):
        return seen, (
            f"Ray counts {counted:g} GPUs, torch sees {len(seen)}; install a torch for its GPU "
            "driver (`nvidia-smi` shows the version), or a newer driver"
        )
    return seen, ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _storage_trouble(
    folder: Path, driver: str, text: str, own: str = "", seconds: float | None = None
) -> str:
    """Return a message if this node cannot read or write in a folder of the run.

    It reads `text` in the file `driver` and, if `own` is given, writes a file of that name and
    content.
    """
    action = "read"
    try:
        from qpruner.runs.storage import retry_storage, storage_at

        path = folder / driver
        if retry_storage(storage_at(path).read, path, seconds, was_there=True).decode() != text:
            return "has other content there than the driver wrote"
        action = "written"
        if own:
            storage_at(folder / own).write(own.encode(), durable=False)
    except ImportError:  # another qpruner or none: `differences` reports it
        return ""
    except FileNotFoundError:
        return "is not shared with this node: a file that the driver wrote is missing there"
    except Exception as error:  # of a file system, of credentials, or of another qpruner
        system_error = getattr(error, "strerror", None)
        why = system_error or f"{type(error).__name__}: {_first_line(error)}"
        return f"cannot be {action} there ({why})"
    return ""
