"""Gemma 3, text models: as Gemma 2, with query and key norms over one head."""

from qpruner.models.structure.family import DividedFamily

GEMMA3 = DividedFamily("gemma3_text", ("transformers.models.gemma3.modeling_gemma3", "Gemma3DecoderLayer"))
