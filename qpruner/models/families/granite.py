"""Granite: Llama's block with multipliers on attention, residual and logits."""

from dataclasses import dataclass
from typing import Any

from qpruner.models.families.family import Family


@dataclass(frozen=True)
class Granite(Family):
    """Llama's projections; what a sublayer adds is multiplied."""

    def residual_factor(self, config: Any) -> float | None:
        return float(config.residual_multiplier)


GRANITE = Granite("granite", ("transformers.models.granite.modeling_granite", "GraniteDecoderLayer"))
