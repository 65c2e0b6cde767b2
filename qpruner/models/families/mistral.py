"""Mistral: the block of Llama, with a sliding window in some versions."""

from qpruner.models.families.family import Family

MISTRAL = Family("mistral", "MistralDecoderLayer", gguf="llama", gguf_ragged="deci")
