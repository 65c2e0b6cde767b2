"""Gemma 3 text models: like Gemma 2, with query and key norms per head."""

from qpruner.models.families.family import DividedFamily

BLOCK = ("transformers.models.gemma3.modeling_gemma3", "Gemma3DecoderLayer")
GEMMA3 = DividedFamily("gemma3_text", BLOCK, down_adds_to_residual=False, gguf="gemma3")
