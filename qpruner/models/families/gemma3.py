"""Gemma 3, text models: as Gemma 2, with query and key norms over one head."""

from qpruner.models.families.gemma2 import Gemma

GEMMA3 = Gemma("gemma3_text", ("transformers.models.gemma3.modeling_gemma3", "Gemma3DecoderLayer"))
