"""Free the memory of dropped models, detect shortages, and measure free memory and peaks."""

import contextlib
import ctypes
import gc
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qpruner.errors import OutOfMemory, first_line

STATUS = Path("/proc/self/status")
VMSTAT = Path("/proc/vmstat")
# oneDNN reports a shortage as a primitive that it could not create; of unsupported ones it names
# the descriptor.
SHORTAGE = re.compile(
    "can't allocate memory|Cannot allocate memory|out of memory|ALLOC_FAILED|bad_alloc|"
    "could not (create|execute) a primitive(?! descriptor)"
)


def release() -> None:
    """Return the memory of dropped models to the GPU and, on Linux, to the operating system.

    Without this, a worker grew by 0.6 GB per trial on SmolLM2 (2026-11-25): Trainer, model and
    callbacks form cycles.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def begin_job(threads: int) -> None:
    """Free the memory of this worker's earlier jobs, and limit torch to `threads` CPU cores.

    With a GPU the cores are not limited.
    """
    import peft  # noqa: F401 - so that what it imports is excluded from garbage collection too

    freeze_libraries()
    release()
    limit_threads(threads)


def limit_threads(threads: int) -> None:
    """Limit torch to this many threads, one at least, if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, threads))


def freeze_libraries() -> Callable[[], None]:
    """Exclude all present objects from garbage collection until the returned function is called.

    A pass over the libraries' objects takes 0.3 s.
    """
    if gc.get_freeze_count():
        return lambda: None
    gc.collect()
    gc.freeze()
    return gc.unfreeze


def read_weights(model: Any) -> None:
    """Read every weight once.

    A memory-mapped .safetensors file takes memory only when it is first read.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().sum()


def copy_weights(model: Any) -> None:
    """Copy weights out of a memory-mapped .safetensors file.

    The file takes memory until its last tensor is freed.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def free_bytes() -> int:
    """Return the free bytes of the GPU, or of the machine if torch sees no GPU."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that GPU or host memory ran out, by its type or its text."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or bool(SHORTAGE.search(str(error)))


def kernel_kills() -> int | None:
    """Count the processes that Linux killed for lack of memory on this machine since boot.

    Return None on other systems.
    """
    with contextlib.suppress(OSError):
        kills = re.search(r"^oom_kill (\d+)$", VMSTAT.read_text(), re.MULTILINE)
        return int(kills[1]) if kills else None
    return None


def shortage_text(error: BaseException) -> str:
    """Describe an out-of-memory error in a few words."""
    return f"out of memory ({first_line(error)[:120]})"


@contextlib.contextmanager
def raising_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn any out-of-memory error into `OutOfMemory` with a remedy."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(shortage_text(error), remedy) from error


class PeakMemory:
    """Measures the peak memory from its creation on.

    It is the allocated memory of a GPU, or the rise of resident memory on a CPU.
    """

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda.is_available()
        self.counter = "cuda peak allocated" if self._cuda else "rise of resident memory"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = int(torch.cuda.memory_allocated())
            return
        with contextlib.suppress(OSError):
            # Linux resets VmHWM to the present size when 5 is written here.
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _most_resident_bytes()

    def bytes(self) -> int:
        """Return the peak so far, in bytes above the memory at the start."""
        import torch

        highest = int(torch.cuda.max_memory_allocated()) if self._cuda else _most_resident_bytes()
        # Linux counts pages per core: 57 kB below the start were seen.
        return max(0, highest - self._before)


def _most_resident_bytes() -> int:
    """Return the peak resident bytes of this process since the last reset.

    On systems without a reset it is the peak since the start.
    """
    if STATUS.exists():
        highest = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        if highest:
            return int(highest[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
