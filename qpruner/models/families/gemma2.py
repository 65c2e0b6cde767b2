"""Gemma 2: norms before and after each sublayer, windowed attention in turns, capped logits."""

from qpruner.models.families.family import DividedFamily

GEMMA2 = DividedFamily("gemma2", "Gemma2DecoderLayer", down_adds_to_residual=False, gguf="gemma2")
