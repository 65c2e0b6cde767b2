"""The description of a model family: names, shapes and what belongs together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UnitSlice:
    """The part of one linear layer that a unit owns.

    Unit ``i`` owns indices ``offset + i * width`` to ``offset + (i + 1) * width`` along ``dim`` of the layer's weight
    ``(rows, columns)``; with ``dim`` 0 also of its bias, if it has one.

    Attributes:
        linear: Path of the layer inside its decoder block.
        dim: 0 cuts rows (outputs), 1 cuts columns (inputs).
        width: Consecutive indices a unit.
        offset: Where the first unit starts, for fused layers.
    """

    linear: str
    dim: int
    width: int
    offset: int = 0


@dataclass(frozen=True)
class UnitKind:
    """One kind of unit in a block: what pruning removes whole.

    Attributes:
        name: `attention` (a key/value head with its query heads) or `mlp` (a channel).
        num_units: Units the block has now.
        slices: What one unit owns, layer by layer.
    """

    name: str
    num_units: int
    slices: tuple[UnitSlice, ...]


@dataclass(frozen=True)
class Family:
    """Separate q/k/v/o and gate/up/down projections, heads grouped by key/value head.

    Attributes:
        model_type: transformers' `config.model_type`.
        decoder_layer: Module and class of the decoder block, so that each block can be built from its own config.
        attention: Path of the attention module in a block.
        mlp: Path of the MLP in a block.
    """

    model_type: str
    decoder_layer: tuple[str, str]
    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"

    def block_path(self, index: int) -> str:
        return f"{self.blocks}.{index}"

    def projections(self) -> dict[str, tuple[str, ...]]:
        """Fused the way servers fuse them: name -> paths inside a block."""
        attention, mlp = self.attention, self.mlp
        return {
            "qkv": (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
            "o": (f"{attention}.o_proj",),
            "gate_up": (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            "down": (f"{mlp}.down_proj",),
        }

    def groups(self, group: str) -> dict[str, tuple[str, ...]]:
        """The linear layers of a block by group: `block`, `sublayer` or `projection`; '' names the whole block."""
        projections = self.projections()
        if group == "projection":
            return projections
        attention = projections["qkv"] + projections["o"]
        mlp = projections["gate_up"] + projections["down"]
        return {"attention": attention, "mlp": mlp} if group == "sublayer" else {"": attention + mlp}

    def unit_kinds(self, layer_config: Any) -> tuple[UnitKind, ...]:
        """The units of a block, from that block's own config."""
        head_dim = self.head_dim(layer_config)
        queries = layer_config.num_attention_heads // layer_config.num_key_value_heads * head_dim
        attention, mlp = self.attention, self.mlp
        return (
            UnitKind(
                "attention",
                layer_config.num_key_value_heads,
                (
                    UnitSlice(f"{attention}.q_proj", 0, queries),
                    UnitSlice(f"{attention}.k_proj", 0, head_dim),
                    UnitSlice(f"{attention}.v_proj", 0, head_dim),
                    UnitSlice(f"{attention}.o_proj", 1, queries),
                ),
            ),
            UnitKind(
                "mlp",
                layer_config.intermediate_size,
                (
                    UnitSlice(f"{mlp}.gate_proj", 0, 1),
                    UnitSlice(f"{mlp}.up_proj", 0, 1),
                    UnitSlice(f"{mlp}.down_proj", 1, 1),
                ),
            ),
        )

    def layer_overrides(self, layer_config: Any, num_units: dict[str, int]) -> dict[str, int]:
        """The config keys of a block that keeps `num_units` units of each kind."""
        heads_per_group = layer_config.num_attention_heads // layer_config.num_key_value_heads
        return {
            "num_key_value_heads": num_units["attention"],
            "num_attention_heads": num_units["attention"] * heads_per_group,
            "intermediate_size": num_units["mlp"],
        }

    def head_dim(self, config: Any) -> int:
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
