"""Finds out what this node is: versions, access to the run's storage, GPUs.

The module is sent to a node whole, since the qpruner there may be another one, or missing. So it needs nothing of
qpruner, except to reach an object store, and returns plain data.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
DRIVERS = ("/proc/driver/nvidia/gpus", "/dev/kfd", "/dev/dxg")
"""Paths of GPU drivers: NVIDIA's, AMD's, that of Windows' Linux."""
DEVICES, NVIDIA, DISPLAY = "/sys/bus/pci/devices", "0x10de", "0x03"
"""Where Linux lists devices, and the vendor and the class prefix of a GPU there."""
HIDERS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
MISSING = "not installed"
REFUSAL = "NodeDiffers: "
"""Begins the error of a node that is not like the driver's; its type is one that every qpruner can unpickle."""


def node_facts_here(
    storage: str, driver: str, me: str, caches: Mapping[str, Sequence[str]], has_gpus: bool
) -> dict[str, Any]:
    """Return the fields of `probe.NodeFacts`.

    Args:
        storage: A folder in the run's storage.
        driver: Name and content of a file that the driver wrote there.
        me: Name and content of a file to write there.
        caches: Environment variables that name folders for copies of the run's files, and patterns of this run's files.
        has_gpus: Whether Ray counts GPUs here; importing torch takes seconds.
    """
    return {
        "versions": versions(),
        "storage": _storage_trouble(Path(storage), driver, driver, me),
        "caches": [_cache(name, Path(os.environ[name]), own) for name, own in caches.items() if name in os.environ],
        "has_hardware": has_hardware(),
        **(_gpus() if has_gpus else {"gpus": [], "gpu_trouble": ""}),
    }


def versions() -> dict[str, str]:
    """Return what must be equal on all nodes; `2.13.0+cpu` and `2.13.0+cu130` count as equal, since devices differ."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "qpruner's code": _code()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = MISSING
    return found


def differing(theirs: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """Return the names of the packages whose versions differ from the driver's."""
    return [name for name in own if theirs[name] != own[name]]


def differences(theirs: Mapping[str, str], own: Mapping[str, str]) -> str:
    """Describe what differs from the driver's versions; empty where nothing does."""
    return ", ".join(f"{name} is {theirs[name]} there and {own[name]} here" for name in differing(theirs, own))


def check_like(own: Mapping[str, str], storage: str, place: str, driver: str, text: str) -> None:
    """Check that this node can work on a run.

    Args:
        own: The driver's versions.
        storage: A folder in the run's storage.
        place: Its name for people.
        driver: Name of a file that the driver keeps there.
        text: Content of that file.

    Raises:
        RuntimeError: `NodeDiffers: `, the node's name and what differs.
    """
    trouble = differences(versions(), own)
    if not trouble:  # another qpruner could not be used for it
        unseen = _lasting_trouble(Path(storage), driver, text)
        trouble = f"`output`: {place} {unseen}" if unseen else ""
    _refuse(trouble or unseen_gpus())


def check_installed(own: Mapping[str, str]) -> None:
    """Check versions and GPUs, for work that writes nothing to the run's storage."""
    _refuse(differences(versions(), own) or unseen_gpus())


def check_gpus() -> None:
    """Check GPUs, on the driver's own node."""
    _refuse(unseen_gpus())


def _refuse(trouble: str) -> None:
    if trouble:
        raise RuntimeError(f"{REFUSAL}{own_name()}: {trouble}")


def own_name() -> str:
    """Return the name of this node for people."""
    import ray

    address, node_id = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    return f"{address} ({platform.node()}, {node_id[:8]})"


def unseen_gpus() -> str:
    """Describe why torch cannot use the GPUs that this process holds; empty where it can, or there is no hardware."""
    import ray

    # Asked by a process that is no worker, Ray would start a cluster to answer.
    if not (ray.is_initialized() and ray.get_gpu_ids() and has_hardware()):
        return ""
    import torch

    if torch.cuda.is_available():
        return ""
    return f"a GPU is reserved for work there, but torch {torch.__version__} sees none"


def has_hardware() -> bool:
    """Return whether there is a GPU driver, or a card without one."""
    return any(Path(path).exists() for path in DRIVERS) or any(map(_is_card, Path(DEVICES).glob("*")))


def _is_card(device: Path) -> bool:
    try:
        maker, kind = (device / "vendor").read_text(), (device / "class").read_text()
    except OSError:
        return False
    return maker.strip() == NVIDIA and kind.startswith(DISPLAY)


def _lasting_trouble(folder: Path, driver: str, text: str) -> str:
    """Describe why the storage cannot be used, for longer than a running trial would wait for it."""
    from qpruner.errors import StorageError
    from qpruner.runs.storage import retry_storage

    trouble = ""

    def look_again() -> None:
        nonlocal trouble
        trouble = _storage_trouble(folder, driver, text)
        if trouble:
            raise OSError(errno.EIO, trouble, str(folder))

    with contextlib.suppress(StorageError):
        retry_storage(look_again, folder)
    return trouble


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


def _storage_trouble(folder: Path, driver: str, text: str, me: str | None = None) -> str:
    """Describe why the storage cannot be used here; empty where it can."""
    try:
        from qpruner.runs.storage import storage_at
    except ImportError:  # another qpruner, or none, which the versions tell
        return ""
    try:
        if storage_at(folder / driver).read().decode() != text:
            return "does not show there what the driver wrote"
    except FileNotFoundError:
        return "is not shared with it: what the driver wrote is not there"
    except OSError as error:
        return f"cannot be read there ({error.strerror})"
    except Exception as error:  # credentials, or another qpruner
        return _unusable(error)
    try:
        if me:
            storage_at(folder / me).write(me.encode(), durable=False)
    except OSError as error:
        return f"cannot be written there ({error.strerror})"
    except Exception as error:
        return _unusable(error)
    return ""


def _unusable(error: Exception) -> str:
    return f"cannot be used there ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def _cache(variable: str, folder: Path, own: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `probe.Cache` for a folder, which may not exist yet."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return {
        "variable": variable,
        "folder": str(folder),
        "disk": existing.stat().st_dev,
        "is_writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "free_bytes": shutil.disk_usage(existing).free,
        "held_bytes": sum(file.stat().st_size for each in own for file in folder.glob(each) if file.is_file()),
    }


def _gpus() -> dict[str, Any]:
    """Return the GPUs that torch sees, and why bitsandbytes cannot quantize on them."""
    for name in HIDERS:  # Ray hides GPUs from what reserves none
        os.environ.pop(name, None)
    try:
        import torch

        seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        trouble = ""
        if seen:
            from bitsandbytes.cextension import lib

            if not lib.compiled_with_cuda:
                platform_of_torch = torch.version.cuda or torch.version.hip
                trouble = f"bitsandbytes has no library for the CUDA or ROCm of torch ({platform_of_torch})"
    except (ImportError, OSError, RuntimeError) as error:
        text = str(error).strip().partition("\n")[0]
        return {"gpus": [], "gpu_trouble": f"torch or bitsandbytes cannot use them: {type(error).__name__}: {text}"}
    gpus = [{"kind": gpu.name, "memory_bytes": gpu.total_memory, "capability": (gpu.major, gpu.minor)} for gpu in seen]
    return {"gpus": gpus, "gpu_trouble": trouble}
