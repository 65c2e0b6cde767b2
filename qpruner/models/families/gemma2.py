"""Gemma 2: norms before and after each sublayer, windowed and full attention in turn, soft-capped logits."""

from dataclasses import dataclass
from typing import Any

from qpruner.models.families.family import DividedFamily


@dataclass(frozen=True)
class Gemma(DividedFamily):
    """Llama's projections, with a norm behind each sublayer."""

    def residual_factor(self, config: Any) -> float | None:
        return None


GEMMA2 = Gemma("gemma2", ("transformers.models.gemma2.modeling_gemma2", "Gemma2DecoderLayer"))
