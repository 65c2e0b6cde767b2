"""GPT-NeoX and Pythia: q, k and v in one layer, biases, a parallel residual, and no gate."""

from dataclasses import dataclass
from typing import Any

from qpruner.models.families.family import ATTENTION, DerivedHeadFamily, UnitKind, UnitSlice


@dataclass(frozen=True)
class GptNeoX(DerivedHeadFamily):
    """GPT-NeoX, with q, k and v in one layer, head by head.

    The rows of `query_key_value` are q, k and v of the first head, then those of the second, and so
    on.
    """

    def attention_projections(self) -> dict[str, tuple[str, ...]]:
        return {"qkv": ("attention.query_key_value",), "o": ("attention.dense",)}

    def mlp_projections(self) -> dict[str, tuple[str, ...]]:
        return {"up": ("mlp.dense_h_to_4h",), "down": ("mlp.dense_4h_to_h",)}

    def attention_kind(self, layer_config: Any) -> UnitKind:
        head_dim = self.head_dim(layer_config)
        rows = UnitSlice("attention.query_key_value.weight", 0, 3 * head_dim)
        columns = UnitSlice("attention.dense.weight", 1, head_dim)
        return UnitKind(ATTENTION, layer_config.num_attention_heads, (rows, columns))


GPT_NEOX = GptNeoX(
    "gpt_neox", "GPTNeoXLayer", "gpt_neox.layers", "gpt_neox.embed_in", attention="attention"
)
