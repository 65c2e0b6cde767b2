"""Find out whether nodes can work on a run: all of them before it, and each where work begins.

What runs on a node is sent there whole, since the qpruner there may be another one, or missing. So those functions need
nothing of qpruner, except to reach an object store, and return plain data.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpruner.cluster.slots import Node, size_of
from qpruner.runs.records import RUN_ID
from qpruner.runs.run_dir import RunDir

ANSWER_SECONDS = 120.0
"""A node answers within this time; importing torch from a cold network file system can take a minute."""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
DEVICES, NVIDIA, DISPLAY = "/sys/bus/pci/devices", "0x10de", "0x03"
"""Where Linux lists devices, and the vendor and the class prefix of a GPU there."""
MISSING = "not installed"
REFUSAL = "NodeDiffers: "
"""Begins the error of a node that is not like the driver's; its type is one that every qpruner can unpickle."""

Copies = Mapping[str, tuple[str, int, Sequence[str]]]
"""What a node keeps copies of, by the variable that names their folder: name, bytes, patterns of the files."""
Gpus = Sequence[tuple[str, int, tuple[int, int]]]
"""Kind, bytes and compute capability, as torch sees them."""


@dataclass(frozen=True)
class NodeReport:
    """One node and its answer."""

    id: str  # Ray's
    name: str  # for people
    size: Node
    problems: dict[str, str]  # by a short word
    gpus: Gpus = ()
    has_left: bool = False  # meanwhile


def look_at_all(storage: Path, driver: str, copies: Copies, seconds: float = ANSWER_SECONDS) -> list[NodeReport]:
    """Ask every live node of the cluster that this process has joined.

    Args:
        storage: A folder in the run's storage; every node writes a file there that is named by its id and holds it.
        driver: Name and content of the driver's own file there.
        copies: What every node keeps copies of.
        seconds: How long to wait for answers.
    """
    import ray
    from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes, own = [node for node in ray.nodes() if node["Alive"]], versions()
    with _module_by_value():
        # A process of its own, which ends with what importing torch took of a GPU.
        task = ray.remote(num_cpus=0, max_calls=1, max_retries=1)(look)
        asked = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(storage), driver, node["NodeID"], own, copies, size_of(node).gpus
            )
            for node in nodes
        ]
    ray.wait(asked, num_returns=len(asked), timeout=seconds)
    reports = []
    for node, reference in zip(nodes, asked, strict=True):
        node_id, has_left, answer = node["NodeID"], False, {}
        try:
            answer = ray.get(reference, timeout=0)
        except (RayError, TimeoutError) as error:
            ray.cancel(reference, force=True)
            has_left = isinstance(error, NodeDiedError | TaskUnschedulableError)  # known before Ray's table says so
            why = f"no answer in {seconds:g} s" if isinstance(error, TimeoutError) else str(error).partition("\n")[0]
            remedy = "see Ray's log there, or take the node out of the cluster (`ray stop`)"
            answer = {"problems": {"no answer": f"it could not be looked at: {why}; {remedy}"}}
        name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node_id[:8]})"
        reports.append(NodeReport(node_id, name, size_of(node), **answer, has_left=has_left))
    return reports


def packed_check(own: Mapping[str, str], run: RunDir | None) -> bytes:
    """Pickle `check_node`, which a worker calls before it imports qpruner.

    Args:
        own: The driver's versions; empty for a run on this machine alone.
        run: None for work that writes nothing to a run's storage.
    """
    from ray import cloudpickle

    place = (str(run.root), run.place, RUN_ID, run.id) if run else None
    with _module_by_value():
        packed: bytes = cloudpickle.dumps(functools.partial(check_node, own, place))
    return packed


@contextlib.contextmanager
def _module_by_value() -> Iterator[None]:
    """Make what is pickled inside contain the functions of this module."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


# ---- on a node


def look(storage: str, driver: str, me: str, own: Mapping[str, str], copies: Copies, gpus: float) -> dict[str, Any]:
    """Return the problems of this node and its GPUs, of which Ray counts so many; write a file `me`."""
    seen, trouble = _gpus(gpus) if gpus else ([], "")
    remedy = "install the same on every node (`launch/up.sh`, or `launch/setup.sh` there) and start Ray there again"
    differs = differences(own)
    problems = {
        "other versions": f"{differs}; {remedy}" if differs else "",
        "storage": _storage_trouble(Path(storage), driver, driver, me, seconds=0.0),
        "disk": _disk_trouble(copies),
        "GPUs": trouble,
    }
    return {"problems": {word: text for word, text in problems.items() if text}, "gpus": seen}


def check_node(own: Mapping[str, str], place: tuple[str, str, str, str] | None) -> None:
    """Check that this node can work on a run.

    Args:
        own: The driver's versions.
        place: A folder in the run's storage, its name for people, name and content of a file that the driver keeps
            there.

    Raises:
        RuntimeError: `NodeDiffers: `, the node's name and what differs.
    """
    trouble = differences(own)
    if place and not trouble:  # another qpruner could not be used for it
        unseen = _storage_trouble(Path(place[0]), *place[2:])  # waits as a trial would
        trouble = f"`output`: {place[1]} {unseen}" if unseen else ""
    if trouble := trouble or _unseen_gpus():
        raise RuntimeError(f"{REFUSAL}{own_name()}: {trouble}")


def own_name() -> str:
    """Return the name of this node for people."""
    import ray

    address, node_id = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    return f"{address} ({platform.node()}, {node_id[:8]})"


def versions() -> dict[str, str]:
    """Return what must be equal on all nodes; `2.13.0+cpu` and `2.13.0+cu130` count as equal, since devices differ."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "qpruner's code": _code()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = MISSING
    return found


def differences(own: Mapping[str, str]) -> str:
    """Describe what differs here from the driver's versions; empty where nothing does."""
    here = versions() if own else {}
    return ", ".join(f"{name} is {here[name]} there and {own[name]} here" for name in own if here[name] != own[name])


def _code() -> str:
    """Return a digest of qpruner's sources: two checkouts of one version may differ."""
    spec = importlib.util.find_spec("qpruner")
    if spec is None or not spec.submodule_search_locations:
        return MISSING
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _unseen_gpus() -> str:
    """Describe why torch cannot use the GPUs that this process holds; empty where it can, or there is no hardware."""
    import ray

    # Asked by a process that is no worker, Ray would start a cluster to answer.
    if not (ray.is_initialized() and ray.get_gpu_ids() and _has_hardware()):
        return ""
    import torch

    is_seen = torch.cuda.is_available()
    return "" if is_seen else f"a GPU is reserved for work there, but torch {torch.__version__} sees none"


def _has_hardware() -> bool:
    """Return whether there is an NVIDIA card, with a driver or without; GPUs may also be declared to Ray."""
    for device in Path(DEVICES).glob("*"):
        with contextlib.suppress(OSError):
            kind = (device / "class").read_text()
            if (device / "vendor").read_text().strip() == NVIDIA and kind.startswith(DISPLAY):
                return True
    return False


def _gpus(counted: float) -> tuple[Gpus, str]:
    """Return the GPUs that torch sees, and why a run cannot use them."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        os.environ.pop(name, None)  # by which Ray hides GPUs from what reserves none
    try:
        import torch

        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        if found:
            from bitsandbytes.cextension import lib

            if not lib.compiled_with_cuda:
                library = torch.version.cuda or torch.version.hip
                raise RuntimeError(f"bitsandbytes has no library for the CUDA or ROCm of torch, {library}")
    except (ImportError, OSError, RuntimeError) as error:
        text = str(error).strip().partition("\n")[0]
        remedy = "install the packages for its driver"
        return [], f"torch or bitsandbytes cannot use them: {type(error).__name__}: {text}; {remedy}"
    seen = [(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in found]
    if len(seen) < counted and (seen or _has_hardware()):
        remedy = "install a torch for its driver (`nvidia-smi` shows that), or a newer driver"
        return seen, f"Ray counts {counted:g} GPUs, torch sees {len(seen)}; {remedy}"
    return seen, ""


def _storage_trouble(folder: Path, driver: str, text: str, me: str = "", seconds: float | None = None) -> str:
    """Describe why the storage cannot be used here, after so many seconds of patience; empty where it can."""
    what = "read"
    try:
        from qpruner.runs.storage import retry_storage, storage_at

        found = storage_at(folder / driver)
        if retry_storage(found.read, folder / driver, seconds, was_there=True).decode() != text:
            return "does not show there what the driver wrote"
        what = "written"
        if me:
            storage_at(folder / me).write(me.encode(), durable=False)
    except ImportError:  # another qpruner, or none, which the versions tell
        return ""
    except FileNotFoundError:
        return "is not shared with it: what the driver wrote is not there"
    except Exception as error:  # a file system, credentials, or another qpruner
        line = str(error).strip().partition("\n")[0]
        return f"cannot be {what} there ({getattr(error, 'strerror', None) or f'{type(error).__name__}: {line}'})"
    return ""


def _disk_trouble(copies: Copies) -> str:
    """Describe which copy does not fit into its folder, which may not exist yet."""
    wanted: Counter[int] = Counter()  # several may lie on one disk
    for variable, (what, size, patterns) in copies.items():
        if variable not in os.environ:
            continue
        folder = Path(os.environ[variable])
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        held = sum(file.stat().st_size for each in patterns for file in folder.glob(each) if file.is_file())
        free = shutil.disk_usage(existing).free if os.access(existing, os.W_OK | os.X_OK) else 0
        disk, missing = existing.stat().st_dev, max(0, size - held)
        left = free - wanted[disk]
        wanted[disk] += missing
        if missing > left:
            needs, has = (f"{size / 2**30:.3f} GiB" for size in (missing, left))
            return (
                f"its copy of {what} takes {needs} in {folder}, where {has} can be written; make room (what other runs "
                f"left there may be deleted while none is at work), or name another folder by {variable} where the "
                "driver is started"
            )
    return ""
