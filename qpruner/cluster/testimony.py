"""What a node says of itself.

Sent to it whole, as it stands here, since the qpruner there may be another one, or missing: so nothing in this module
needs qpruner, but to reach an object store, and what it answers is plain data.
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
"""One of these is there where a driver for GPUs is: NVIDIA's, AMD's, that of Windows' Linux."""
DEVICES, NVIDIA, DISPLAY = "/sys/bus/pci/devices", "0x10de", "0x03"
"""Where Linux lists the devices of a machine, and what it says of a GPU: its maker, and its class begins so."""
HIDERS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
MISSING = "not installed"
REFUSAL = "NodeDiffers: "
"""Begins the error of a machine that is not like the driver's, of a type that every qpruner can read."""


def testify(storage: str, driver: str, me: str, caches: Mapping[str, Sequence[str]], has_gpus: bool) -> dict[str, Any]:
    """Look at this machine.

    Args:
        storage: A folder in the run's storage.
        driver: Name of a file that the driver left there, and what it says.
        me: Name of a file to leave there, and what to say in it.
        caches: Environment variables that name folders for copies of the run's files, and patterns of those that are of
            this run; of a variable that is unset there is no folder.
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
    """What must be alike on all machines: `2.13.0+cpu` and `2.13.0+cu130` are, since devices differ."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "qpruner's code": _code()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = MISSING
    return found


def differing(theirs: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """Names of the packages that are others than the driver's."""
    return [name for name in own if theirs[name] != own[name]]


def differences(theirs: Mapping[str, str], own: Mapping[str, str]) -> str:
    """What is other than the driver's, in words; nothing where all is alike."""
    return ", ".join(f"{name} is {theirs[name]} there and {own[name]} here" for name in differing(theirs, own))


def check_like(own: Mapping[str, str], storage: str, place: str, driver: str, text: str) -> None:
    """Refuse to work on a machine that is not like the driver's.

    Args:
        own: The driver's versions.
        storage: A folder in the run's storage.
        place: As a person knows it.
        driver: Name of a file that the driver keeps there.
        text: What it says.

    Raises:
        RuntimeError: `NodeDiffers: `, the node's name and what differs.
    """
    trouble = differences(versions(), own)
    if not trouble:  # else that qpruner cannot be asked
        unseen = _lasting_trouble(Path(storage), driver, text)
        trouble = f"`output`: {place} {unseen}" if unseen else ""
    _refuse(trouble or unseen_gpus())


def check_installed(own: Mapping[str, str]) -> None:
    """As `check_like`, for work that leaves nothing in the run's storage."""
    _refuse(differences(versions(), own) or unseen_gpus())


def check_gpus() -> None:
    """As `check_like`, on the driver's own machine."""
    _refuse(unseen_gpus())


def _refuse(trouble: str) -> None:
    if trouble:
        raise RuntimeError(f"{REFUSAL}{own_name()}: {trouble}")


def own_name() -> str:
    """The node of this process, as a person knows it."""
    import ray

    address, node_id = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    return f"{address} ({platform.node()}, {node_id[:8]})"


def unseen_gpus() -> str:
    """Why the GPUs that this process holds cannot be used, which torch would do without; nothing where it holds none,
    where torch sees them, and where somebody told Ray of GPUs that are not there."""
    import ray

    # Asked by a process that is no worker, Ray would start a cluster to answer.
    if not (ray.is_initialized() and ray.get_gpu_ids() and has_hardware()):
        return ""
    import torch

    if torch.cuda.is_available():
        return ""
    return f"a GPU is reserved for work there, but torch {torch.__version__} sees none"


def has_hardware() -> bool:
    """Whether there are GPUs: a driver for them, or a card that lacks one."""
    return any(Path(path).exists() for path in DRIVERS) or any(map(_is_card, Path(DEVICES).glob("*")))


def _is_card(device: Path) -> bool:
    try:
        maker, kind = (device / "vendor").read_text(), (device / "class").read_text()
    except OSError:
        return False
    return maker.strip() == NVIDIA and kind.startswith(DISPLAY)


def _lasting_trouble(folder: Path, driver: str, text: str) -> str:
    """Why the storage cannot be used from here, for longer than a trial under way would wait for it."""
    from qpruner.errors import StorageError
    from qpruner.runs.storage import retry_storage

    told = ""

    def look_again() -> None:
        nonlocal told
        told = _storage_trouble(folder, driver, text)
        if told:
            raise OSError(errno.EIO, told, str(folder))

    with contextlib.suppress(StorageError):
        retry_storage(look_again, folder)
    return told


def _code() -> str:
    """Digest of qpruner's own sources: two checkouts of one version may differ."""
    spec = importlib.util.find_spec("qpruner")
    if spec is None or not spec.submodule_search_locations:
        return MISSING
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _storage_trouble(folder: Path, driver: str, text: str, me: str | None = None) -> str:
    """Tell why the storage cannot be used from here; nothing where it can."""
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
            storage_at(folder / me).write_progress(me.encode())
    except OSError as error:
        return f"cannot be written there ({error.strerror})"
    except Exception as error:
        return _unusable(error)
    return ""


def _unusable(error: Exception) -> str:
    return f"cannot be used there ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def _cache(variable: str, folder: Path, own: Sequence[str]) -> dict[str, Any]:
    """A folder for copies of the run's files, which may not be there yet."""
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
    """The GPUs that torch sees, and why bitsandbytes cannot quantize on them."""
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
