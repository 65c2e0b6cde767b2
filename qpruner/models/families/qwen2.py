"""Qwen2 and 2.5: the block of Llama, with biases on q, k and v."""

from qpruner.models.families.family import Family

QWEN2 = Family("qwen2", "Qwen2DecoderLayer", gguf="qwen2", gguf_ragged="deci")
