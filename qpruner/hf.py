"""`import qpruner.hf` once, and plain transformers loads qpruner's folders.

Registers the mixed-precision quantizer and lets the supported families build blocks of different widths, so that
`AutoModelForCausalLM.from_pretrained(folder)` works on pruned and on final folders; an adapter beside the weights is
attached by transformers itself.
"""

from qpruner.models import ragged
from qpruner.quantization import mixed

__all__ = ["mixed", "ragged"]

ragged.install()
