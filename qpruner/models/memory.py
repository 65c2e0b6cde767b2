"""Memory of this process: giving back what a model took, what is free for one, and the peak of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qpruner.errors import OutOfMemory, first_line

if TYPE_CHECKING:
    import torch

STATUS, VMSTAT = Path("/proc/self/status"), Path("/proc/vmstat")
SHORTAGE = re.compile(
    "can't allocate memory|Cannot allocate memory|out of memory|ALLOC_FAILED|bad_alloc|"
    "could not (create|execute) a primitive(?! descriptor)"
)


def release() -> None:
    """Free what dropped models held: to the GPU's other users, and on Linux to the system.

    Trainer, model and callbacks refer to each other, so a dropped model waits for the cycle collector: without this a
    reused actor grew by 0.6 GB a trial on SmolLM2 (measured 2026-11-25).
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@functools.cache
def freeze_libraries() -> None:
    """Keep the objects of the libraries out of the cycle collector's passes; for a process that holds no model yet.

    A pass over the objects of torch, transformers and Ray takes 0.2 s and more, and every trial makes two or three
    (measured 2026-11-28). Whatever is alive now and ends up in a cycle is never freed.
    """
    gc.collect()
    gc.freeze()


def read_weights(model: torch.nn.Module) -> None:
    """Read every weight once: those of a mapped .safetensors file take memory only when first read.

    SmolLM2's 266 MB counted as its generation's, twice in all (torch 2.13, transformers 5.24).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().sum()


def copy_weights(model: torch.nn.Module) -> None:
    """Copy every weight out of its mapped .safetensors file.

    The file stays resident until its last tensor is gone, so a model cut in place would be there twice.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def free_bytes() -> int:
    """Return the free memory of the GPU, or of the machine where torch sees no GPU."""
    import psutil
    import torch

    return int(torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that GPU or host memory ran out: Python's own, torch's, or a library's in words.

    oneDNN, which multiplies matrices on CPUs, says no more than that it could not create or execute a primitive; what
    it does not support is a primitive's descriptor (torch 2.13).
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or bool(SHORTAGE.search(str(error)))


def kernel_kills() -> int | None:
    """Count the processes that this machine's kernel has killed for want of memory; None where it does not count."""
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", VMSTAT.read_text(), re.MULTILINE)
        return int(found[1]) if found else None
    return None


def shortage_text(error: BaseException) -> str:
    """Describe an out-of-memory error in a few words."""
    return f"out of memory ({first_line(error)[:120]})"


@contextlib.contextmanager
def raising_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn errors about memory that ran out into `OutOfMemory`, with what to do next."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(shortage_text(error), remedy) from error


class PeakMemory:
    """Measure the peak from now on: CUDA's own counter, or the rise of resident memory on a CPU."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda.is_available()
        self.counter = "cuda peak allocated" if self._cuda else "rise of resident memory"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = int(torch.cuda.memory_allocated())
            return
        with contextlib.suppress(OSError):  # Linux resets VmHWM to the present size when 5 is written here
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _most_resident_bytes()

    def bytes(self) -> int:
        """Bytes above the start, at the highest point so far."""
        import torch

        highest = int(torch.cuda.max_memory_allocated()) if self._cuda else _most_resident_bytes()
        return max(0, highest - self._before)  # Linux counts pages by core: 57 kB less than before were seen


def _most_resident_bytes() -> int:
    """Return the most that this process held in memory, since the last reset where there is one."""
    if found := STATUS.exists() and re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
