"""Phi-3 and Phi-4 (text): q, k and v concatenated in one layer, gate and up in another."""

from dataclasses import dataclass
from typing import Any

from qpruner.models.families.family import ATTENTION, MLP, Family, UnitKind, UnitSlice


@dataclass(frozen=True)
class Phi3(Family):
    """Phi-3, whose fused layers hold one projection after the other.

    The rows of `qkv_proj` are all queries, all keys, all values; of `gate_up_proj`, all gates, all
    ups.
    """

    def attention_projections(self) -> dict[str, tuple[str, ...]]:
        return {"qkv": ("self_attn.qkv_proj",), "o": ("self_attn.o_proj",)}

    def mlp_projections(self) -> dict[str, tuple[str, ...]]:
        return {"gate_up": ("mlp.gate_up_proj",), "down": ("mlp.down_proj",)}

    def attention_kind(self, layer_config: Any) -> UnitKind:
        head_dim = self.head_dim(layer_config)
        groups = layer_config.num_key_value_heads
        heads = layer_config.num_attention_heads // groups
        width = heads * head_dim  # of the queries
        keys = groups * width
        values = keys + groups * head_dim
        slices = (
            UnitSlice("self_attn.qkv_proj.weight", 0, width, heads=heads),
            UnitSlice("self_attn.qkv_proj.weight", 0, head_dim, offset=keys),
            UnitSlice("self_attn.qkv_proj.weight", 0, head_dim, offset=values),
            UnitSlice("self_attn.o_proj.weight", 1, width, heads=heads),
        )
        return UnitKind(ATTENTION, groups, slices)

    def mlp_kind(self, layer_config: Any) -> UnitKind:
        channels = layer_config.intermediate_size
        slices = (
            UnitSlice("mlp.gate_up_proj.weight", 0, 1),
            UnitSlice("mlp.gate_up_proj.weight", 0, 1, offset=channels),
            UnitSlice("mlp.down_proj.weight", 1, 1),
        )
        return UnitKind(MLP, channels, slices)

    def is_plain(self, config: Any, widths: dict[str, int]) -> bool:
        """Return False if transformers would refuse the long-rope factors.

        It derives their number from the heads.
        """
        rope = config.rope_parameters
        head_dim = config.hidden_size // widths["num_attention_heads"]
        pairs = int(head_dim * rope["partial_rotary_factor"]) // 2
        factors = [rope.get("short_factor"), rope.get("long_factor")]
        return all(len(factor) == pairs for factor in factors if factor)


PHI3 = Phi3("phi3", "Phi3DecoderLayer")
