"""Print about how many minutes the demo takes on two free cores of this machine.

The estimate comes from the time of a matrix product.
"""

import time

import torch

from qpruner.models import cpu

STARTS, PRODUCTS = 150.0, 18_000
"""Seconds for starts of processes, and products in a run: 3.6 minutes at 3.5 ms each, at 21 ms
about 9."""

cpu.install()
torch.set_num_threads(1)
inputs, weight = (
    torch.ones(1024, 576, dtype=torch.bfloat16),
    torch.ones(1536, 576, dtype=torch.bfloat16),
)
taken = []
for _ in range(20):
    start = time.perf_counter()
    inputs @ weight.T
    taken.append(time.perf_counter() - start)
print(round((STARTS + PRODUCTS * min(taken)) / 60))
