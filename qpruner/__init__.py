"""qpruner: structured pruning and a searched mixed-precision plan for large language models.

From Python, `run` runs a configuration, up to a stage or whole; `read_run` reads a run folder. Both
return a `Snapshot` of the recorded results.
"""

import logging

from qpruner.api import read_run, run
from qpruner.runs.version import VERSION

__all__ = ["read_run", "run"]
__version__ = VERSION

# On CPUs with bfloat16 instructions bitsandbytes (0.50) warns on import that it cannot fetch a
# kernel from the hub. No layer of qpruner uses that kernel (`quantization.mixed`).
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
