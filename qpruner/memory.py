"""Peak memory of a piece of work in this process: CUDA's own counter, or the rise of resident memory on a CPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Starts counting when it is made.

    Attributes:
        counter: What was counted, for the record.
    """

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = int(torch.cuda.memory_allocated())
            self.counter = "cuda peak allocated"
            return
        self.counter = "rise of resident memory"
        self._resettable = _reset_high_water_mark()
        self._before = _status_bytes("VmRSS") if self._resettable else _max_resident_bytes()

    def bytes(self) -> int:
        """Bytes above the start, at the highest point so far."""
        import torch

        if self._cuda:
            return int(torch.cuda.max_memory_allocated()) - self._before
        peak = _status_bytes("VmHWM") if self._resettable else _max_resident_bytes()
        return peak - self._before


def _reset_high_water_mark() -> bool:
    """Linux resets VmHWM to the present size when 5 is written here; False where there is no such file."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _max_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
