"""OLMo 2: query and key norms over all heads together, so their weights are cut with the heads.

The norm's mean square is then over the heads that stay. A model whose removed heads were only set to zero would divide
by the old number of heads and make every attention score smaller by kept / all heads; taking the mean over what is left
keeps queries and keys at their size. "Cut equals masked" therefore holds for this family with a norm that leaves the
masked heads out of its mean.
"""

from dataclasses import dataclass, replace
from typing import Any

from qpruner.models.structure.family import Family, UnitKind, UnitSlice


@dataclass(frozen=True)
class Olmo2(Family):
    """Llama's projections, and norms that follow the heads."""

    def attention_kind(self, layer_config: Any) -> UnitKind:
        kind = super().attention_kind(layer_config)
        queries, keys = kind.slices[0].width, kind.slices[1].width
        norms = (
            UnitSlice("self_attn.q_norm.weight", 0, queries),
            UnitSlice("self_attn.k_norm.weight", 0, keys),
        )
        return replace(kind, slices=(*norms, *kind.slices))

    def residual_factor(self, config: Any) -> float | None:
        return None


OLMO2 = Olmo2("olmo2", ("transformers.models.olmo2.modeling_olmo2", "Olmo2DecoderLayer"))
