"""Gemma 2: norms before and after each sublayer, windowed and full attention in turn, soft-capped logits."""

from qpruner.models.structure.family import DividedFamily

GEMMA2 = DividedFamily("gemma2", ("transformers.models.gemma2.modeling_gemma2", "Gemma2DecoderLayer"))
