"""Gemma 3 text models: like Gemma 2, with query and key norms per head."""

from qpruner.models.families.family import DividedFamily

GEMMA3 = DividedFamily(
    "gemma3_text", "Gemma3DecoderLayer", down_adds_to_residual=False, gguf="gemma3"
)
