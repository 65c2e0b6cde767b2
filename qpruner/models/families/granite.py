"""Granite: the block of Llama, with multipliers on attention, logits and the residual stream.

The last is `residual_multiplier`.
"""

from qpruner.models.families.family import Family

GRANITE = Family("granite", "GraniteDecoderLayer")
