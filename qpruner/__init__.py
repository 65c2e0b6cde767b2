"""qpruner: structured pruning and a searched mixed-precision plan for large language models."""

__version__ = "0.1.0"
