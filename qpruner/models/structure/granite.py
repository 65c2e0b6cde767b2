"""Granite: Llama's block with multipliers on attention, residual and logits."""

from qpruner.models.structure.family import Family

GRANITE = Family("granite", ("transformers.models.granite.modeling_granite", "GraniteDecoderLayer"))
