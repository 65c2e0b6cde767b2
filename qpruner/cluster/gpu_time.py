"""What work holds of GPUs: seconds at work times how many are reserved for it, whether it keeps them busy or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class GpuTime:
    """Adds up.

    Attributes:
        seconds: Times GPUs, so far.
    """

    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count what was held, seconds times GPUs."""
        self.seconds += seconds

    @contextmanager
    def held(self, gpus: float) -> Iterator[None]:
        """Count so many GPUs for as long as this lasts, however it ends."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(gpus * (time.monotonic() - started))
