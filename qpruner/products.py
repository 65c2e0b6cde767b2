"""How fast this device multiplies matrices: what hours are estimated by where no step is timed."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from qpruner.models import cpu
from qpruner.models.loading import device

SECONDS = 0.3
LARGEST = {"cpu": (1024, 128), "cuda": (8192, 8192)}
"""Rows and columns, and tokens, of a product that is timed, at most. A core is no faster at larger ones (110 GFLOP/s at
128 and at 512 tokens with AVX2), and what takes longer than its time slice is mostly timed together with other work."""


@functools.cache
def operations_per_second(rows: int, columns: int, tokens: int, dtype: str, threads: int, slots: int) -> float:
    """Of one slot, while all of them multiply: the threads of one core, or cores that share a cache, are slower so.

    Args:
        rows: Outputs of the layer that is multiplied with.
        columns: Its inputs.
        tokens: Rows of what it is multiplied with.
        dtype: Of both, as the configuration names it.
        threads: CPU cores of a slot; of no account on a GPU.
        slots: Slots of this machine that work at once; of no account on a GPU.
    """
    where = device()
    widest, most = LARGEST[where]
    rows, columns, tokens = min(rows, widest), min(columns, widest), min(tokens, most)
    operations = 2 * rows * columns * tokens
    weight = torch.randn(rows, columns, device=where).to(getattr(torch, dtype))
    inputs = torch.randn(tokens, columns, device=where).to(weight.dtype)
    if where == "cuda":
        return operations / _seconds(inputs, weight)
    cpu.install()

    def slot(_: int) -> float:
        torch.set_num_threads(threads)  # every Python thread has its own number
        return _seconds(inputs, weight)

    before = torch.get_num_threads()
    with ThreadPoolExecutor(slots) as pool:
        taken = list(pool.map(slot, range(slots)))
    torch.set_num_threads(before)
    return operations * slots / sum(taken)


def _seconds(inputs: torch.Tensor, weight: torch.Tensor) -> float:
    """Of one product: what a tenth of them stay below, since what else the machine does only adds."""
    taken: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(taken) < 10 or time.perf_counter() < until:
        started = time.perf_counter()
        torch.nn.functional.linear(inputs, weight)
        if inputs.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 10]
