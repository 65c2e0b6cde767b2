"""qpruner: structured pruning and a searched mixed-precision plan for large language models.

In Python: `run` a configuration, or only up to a stage (`stages.prune`, `stages.search`, ...), and `read_run` a folder;
all give a `Snapshot` of what is recorded.
"""

from __future__ import annotations

from qpruner import stages
from qpruner.stages import read_run, run
from qpruner.version import VERSION

__all__ = ["read_run", "run", "stages"]
__version__ = VERSION
