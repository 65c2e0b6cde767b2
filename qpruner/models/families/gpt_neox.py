"""GPT-NeoX and Pythia: q, k and v of a head lie together in one layer; biases, parallel residual, no gate."""

from dataclasses import dataclass
from typing import Any

from qpruner.models.families.family import ATTENTION, MLP, DerivedHeadFamily, UnitKind, UnitSlice, resized


@dataclass(frozen=True)
class GptNeoX(DerivedHeadFamily):
    """Rows of `query_key_value` are head by head: query, key, value of the first head, then of the second."""

    def projections(self) -> dict[str, tuple[str, ...]]:
        return {
            "qkv": ("attention.query_key_value",),
            "o": ("attention.dense",),
            "up": ("mlp.dense_h_to_4h",),
            "down": ("mlp.dense_4h_to_h",),
        }

    def attention_kind(self, layer_config: Any) -> UnitKind:
        head_dim = self.head_dim(layer_config)
        slices = (
            UnitSlice("attention.query_key_value.weight", 0, 3 * head_dim),
            UnitSlice("attention.dense.weight", 1, head_dim),
        )
        return UnitKind(ATTENTION, layer_config.num_attention_heads, slices)

    def mlp_kind(self, layer_config: Any) -> UnitKind:
        slices = (
            UnitSlice("mlp.dense_h_to_4h.weight", 0, 1),
            UnitSlice("mlp.dense_4h_to_h.weight", 1, 1),
        )
        return UnitKind(MLP, layer_config.intermediate_size, slices)

    def widths(self, layer_config: Any, index: int, num_units: dict[str, int]) -> dict[str, int]:
        return {"num_attention_heads": num_units[ATTENTION], "intermediate_size": num_units[MLP]}

    def after_build(self, block: Any, config: Any, index: int) -> None:
        columns = config.per_layer_config[index].num_attention_heads * self.head_dim(config)
        attention = block.attention
        if columns != attention.dense.in_features:
            attention.query_key_value = resized(attention.query_key_value, 3 * columns, config.hidden_size)
            attention.dense = resized(attention.dense, config.hidden_size, columns)


GPT_NEOX = GptNeoX(
    "gpt_neox", ("transformers.models.gpt_neox.modeling_gpt_neox", "GPTNeoXLayer"), "gpt_neox.layers", "attention"
)
