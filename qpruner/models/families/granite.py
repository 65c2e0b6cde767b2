"""Granite: the block of Llama, with multipliers on attention, residual (`residual_multiplier`) and
logits."""

from qpruner.models.families.family import Family

GRANITE = Family("granite", "GraniteDecoderLayer")
