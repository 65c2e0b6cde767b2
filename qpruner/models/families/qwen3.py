"""Qwen3: query and key norms per head, so cutting heads does not change them."""

from qpruner.models.families.family import Family

QWEN3 = Family("qwen3", "Qwen3DecoderLayer", gguf="qwen3", gguf_ragged="openelm")
