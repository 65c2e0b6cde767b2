"""Qwen2 / 2.5 (biases on q, k, v) and Qwen3 (query and key norms over one head, so untouched by a cut of heads)."""

from qpruner.models.structure.family import Family

QWEN2 = Family("qwen2", ("transformers.models.qwen2.modeling_qwen2", "Qwen2DecoderLayer"))
QWEN3 = Family("qwen3", ("transformers.models.qwen3.modeling_qwen3", "Qwen3DecoderLayer"))
