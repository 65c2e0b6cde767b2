"""How fast this device multiplies and packs matrices: what hours are estimated by where no step is timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from qpruner.config.schema import LoraConfig
from qpruner.models import cpu
from qpruner.models.loading import device
from qpruner.quantization.bank import EntrySettings, build_entry

SECONDS = 0.3
LARGEST = {"cpu": (1024, 128), "cuda": (8192, 8192)}
"""Rows and columns, and tokens, of a product that is timed, at most. A core is no faster at larger ones (110 GFLOP/s at
128 and at 512 tokens with AVX2), and what takes longer than its time slice is mostly timed together with other work."""
SVD_OPERATIONS = 150
"""A weight, for a randomized SVD of rank 8 and packing."""


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
    return operations / _side_by_side(lambda: _seconds(inputs, weight), threads, slots)


@functools.cache
def packing_per_second(
    rows: int, columns: int, settings: EntrySettings, levels: tuple[int, ...], dtype: str, threads: int, slots: int
) -> float:
    """Operations a second, as `packing_operations` counts them, of one slot that builds the bank while all of them do.

    Quantizing and factorizing keep a core far below the speed of its products: 2 of 100 GFLOP/s with AVX2.

    Args:
        rows: Outputs of the layer that is packed.
        columns: Its inputs.
        settings: Of the bank's entries.
        levels: Bit-widths, without 16.
        dtype: Of the weights, as the configuration names it.
        threads: CPU cores of a slot; of no account on a GPU.
        slots: Slots of this machine that work at once; of no account on a GPU.
    """
    where = device()
    lora = settings.lora.model_copy(update={"loftq_iterations": 1})  # which count alike
    settings = replace(settings, lora=lora)
    most = LARGEST["cpu"][0] // (2 if _is_exact(lora) else 1)
    rows, columns = min(rows, most), min(columns, most)
    weight = torch.randn(rows, columns, device=where).to(getattr(torch, dtype))

    def seconds() -> float:
        taken: list[float] = []
        until = time.perf_counter() + SECONDS
        while len(taken) < 2 or time.perf_counter() < until:
            started = time.perf_counter()
            for bits in levels:
                build_entry({"": weight}, bits, settings)
            taken.append(time.perf_counter() - started)
        return sum(taken[1:]) / len(taken[1:])  # the first warms up

    taken = seconds() if where == "cuda" else _side_by_side(seconds, threads, slots)
    return packing_operations(rows, columns, lora, len(levels)) / taken


def packing_operations(rows: int, columns: int, lora: LoraConfig, num_levels: int) -> float:
    """Of a layer at so many bit-widths."""
    by_weight = 10 * min(rows, columns) if _is_exact(lora) else SVD_OPERATIONS
    return float(num_levels * lora.loftq_iterations * by_weight * rows * columns)


def _is_exact(lora: LoraConfig) -> bool:
    return lora.init == "loftq" and lora.svd == "exact"


def _side_by_side(seconds: Callable[[], float], threads: int, slots: int) -> float:
    """What it takes a slot, on average, while all of them do the same."""

    def slot(_: int) -> float:
        torch.set_num_threads(threads)  # every Python thread has its own number
        return seconds()

    before = torch.get_num_threads()
    with ThreadPoolExecutor(slots) as pool:
        taken = list(pool.map(slot, range(slots)))
    torch.set_num_threads(before)
    return sum(taken) / slots


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
