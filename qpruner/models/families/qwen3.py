"""Qwen3: query and key norms over one head, so a cut of heads does not touch them."""

from qpruner.models.families.family import Family

QWEN3 = Family("qwen3", ("transformers.models.qwen3.modeling_qwen3", "Qwen3DecoderLayer"))
