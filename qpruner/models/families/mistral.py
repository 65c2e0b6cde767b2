"""Mistral: Llama's block, with a sliding window in some versions."""

from qpruner.models.families.family import Family

MISTRAL = Family("mistral", ("transformers.models.mistral.modeling_mistral", "MistralDecoderLayer"))
