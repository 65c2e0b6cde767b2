"""Print about how many minutes the demo takes on two free cores of this machine.

The estimate comes from the time of a matrix product.
"""

import time

import torch

from qpruner.models import cpu

START_SECONDS = 150.0
"""Time in which the processes of a run start."""
PRODUCTS = 18_000
"""Matrix products in a run: at 3.5 ms for one it takes 3.6 minutes, at 21 ms about 9."""

cpu.install()
torch.set_num_threads(1)
inputs = torch.ones(1024, 576, dtype=torch.bfloat16)
weight = torch.ones(1536, 576, dtype=torch.bfloat16)
seconds = []
for _ in range(20):
    start = time.perf_counter()
    inputs @ weight.T
    seconds.append(time.perf_counter() - start)
print(round((START_SECONDS + PRODUCTS * min(seconds)) / 60))
