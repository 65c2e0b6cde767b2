"""qpruner: structured pruning and a searched mixed-precision plan for large language models.

In Python: `run` a configuration, or only up to a stage (`stages.prune`, `stages.search`, ...), and `read_run` a folder;
all give a `Snapshot` of what is recorded.
"""

from __future__ import annotations

import logging

from qpruner import api as stages
from qpruner.api import read_run, run
from qpruner.runs.version import VERSION

__all__ = ["read_run", "run", "stages"]
__version__ = VERSION

# On CPUs with bfloat16 instructions bitsandbytes (0.50) warns, when it is imported, that it cannot fetch a kernel from
# the hub, which no layer of qpruner uses (`quantization.mixed`).
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
