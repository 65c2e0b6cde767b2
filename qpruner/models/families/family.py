"""The description of a model family: names, shapes and what belongs together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION, MLP, EXPERT = "attention", "mlp", "expert"
"""Kinds of unit: a key/value head with its query heads, an MLP channel, a whole expert with its row of the router."""


Groups = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
"""Name of a group -> its linear layers, and the modules whose outputs are its own."""


@dataclass(frozen=True)
class UnitSlice:
    """The part of one parameter that a unit owns.

    Unit ``i`` owns indices ``offset + i * width`` to ``offset + (i + 1) * width`` along ``dim``. Where rows of a linear
    layer's weight go, the same entries of its bias go too (`owned_parameters` adds them).
    """

    parameter: str  # its path inside the decoder block
    dim: int  # of a linear layer's weight (rows, columns): 0 cuts outputs, 1 inputs
    width: int
    offset: int = 0  # where the first unit starts, in fused layers
    heads: int = 1  # query heads that make up the width, where a key/value head has several


@dataclass(frozen=True)
class UnitKind:
    """One kind of unit in a block (`attention`, `mlp` or `expert`): what pruning removes whole."""

    name: str
    num_units: int
    slices: tuple[UnitSlice, ...]
    partitions: int = 1
    """Experts whose channels are stacked in one parameter ``(experts, rows, columns)``: unit
    ``expert * channels + channel``. Every expert keeps the same number of channels, each its own."""
    least: int = 1  # units that must stay

    @property
    def units_per_partition(self) -> int:
        """Channels of one expert; all units where nothing is stacked."""
        return self.num_units // self.partitions

    @property
    def output_linear(self) -> str | None:
        """The linear layer whose columns the units own (o, down); None where it is stacked in one parameter."""
        outputs = [item for item in self.slices if item.dim == 1 and item.parameter.endswith(".weight")]
        return outputs[-1].parameter.removesuffix(".weight") if outputs and self.partitions == 1 else None


def owned_parameters(block: torch.nn.Module, kind: UnitKind) -> Iterator[tuple[UnitSlice, torch.nn.Parameter]]:
    """Every parameter that the units of a kind own parts of, the biases of cut rows included."""
    for item in kind.slices:
        yield item, block.get_parameter(item.parameter)
        path, _, name = item.parameter.rpartition(".")
        bias = getattr(block.get_submodule(path), "bias", None)
        if item.dim == 0 and name == "weight" and bias is not None:
            yield replace(item, parameter=f"{path}.bias"), bias


@dataclass(frozen=True)
class Family:
    """Separate q/k/v/o and gate/up/down projections, heads grouped by key/value head; other families override parts."""

    model_type: str  # transformers' `config.model_type`
    decoder_layer: tuple[str, str]  # module and class of the block, so that each can be built from its own config
    blocks: str = "model.layers"  # path of the list of blocks in the model
    attention: str = "self_attn"  # path of the attention module in a block
    mlp: str = "mlp"  # path of the MLP in a block; '' where its layers lie in the block itself
    channels_key: str = "intermediate_size"  # config key of the MLP's width
    down_adds_to_residual: bool = True  # False: a norm stands behind the MLP, or stacked experts in its place
    has_learned_positions: bool = False  # positions are a table, which ends; others can be computed for any
    unquantizable: tuple[str, ...] = ()  # weights of a block that no group can hold, stacked in one parameter

    def block_path(self, index: int) -> str:
        """Return the path of block `index` in the model."""
        return f"{self.blocks}.{index}"

    # ---- what servers fuse

    def attention_projections(self) -> dict[str, tuple[str, ...]]:
        """Map `qkv` and `o` to the paths of linear layers inside a block."""
        qkv = tuple(f"{self.attention}.{name}_proj" for name in "qkv")
        return {"qkv": qkv, "o": (f"{self.attention}.o_proj",)}

    def mlp_projections(self) -> dict[str, tuple[str, ...]]:
        """Map the layers of the MLP as servers fuse them to their paths; the last is the output projection."""
        return {"gate_up": (f"{self.mlp}.gate_proj", f"{self.mlp}.up_proj"), "down": (f"{self.mlp}.down_proj",)}

    def projections(self) -> dict[str, tuple[str, ...]]:
        """Map all that groups can hold of a block."""
        return self.attention_projections() | self.mlp_projections()

    def groups(self, group: str) -> Groups:
        """List the groups of a block by `block`, `sublayer` or `projection`; '' is the whole block."""
        projections = self.projections()
        if group == "projection":
            return {name: (paths, paths) for name, paths in projections.items()}
        attention = projections.pop("qkv") + projections.pop("o")
        mlp = tuple(path for paths in projections.values() for path in paths)
        if group == "block":
            return {"": (attention + mlp, ("",))}
        sublayers: Groups = {"attention": (attention, (self.attention,))}
        if mlp:
            sublayers["mlp"] = (mlp, (self.mlp,) if self.mlp else mlp[-1:])
        return sublayers

    # ---- what pruning removes

    def unit_kinds(self, layer_config: Any, index: int) -> tuple[UnitKind, ...]:
        """List the units of block `index` from that block's own config; whole experts before channels."""
        return (self.attention_kind(layer_config), self.mlp_kind(layer_config))

    def key_value_heads(self, config: Any) -> int:
        """Count the heads that have keys and values."""
        return int(config.num_key_value_heads)

    def attention_kind(self, layer_config: Any) -> UnitKind:
        """Describe key/value heads with their query heads."""
        head_dim, groups = self.head_dim(layer_config), self.key_value_heads(layer_config)
        heads = layer_config.num_attention_heads // groups
        (queries, keys, values), (output,) = self.attention_projections().values()
        slices = (
            UnitSlice(f"{queries}.weight", 0, heads * head_dim, heads=heads),
            UnitSlice(f"{keys}.weight", 0, head_dim),
            UnitSlice(f"{values}.weight", 0, head_dim),
            UnitSlice(f"{output}.weight", 1, heads * head_dim, heads=heads),
        )
        return UnitKind(ATTENTION, groups, slices)

    def mlp_kind(self, layer_config: Any) -> UnitKind:
        """Describe channels: a row of gate and of up, a column of down."""
        *rows, output = (path for paths in self.mlp_projections().values() for path in paths)
        slices = (*(UnitSlice(f"{path}.weight", 0, 1) for path in rows), UnitSlice(f"{output}.weight", 1, 1))
        return UnitKind(MLP, getattr(layer_config, self.channels_key), slices)

    def residual_factor(self, config: Any) -> float | None:
        """Return the factor from the MLP's output to the residual stream; None behind a norm or for stacked experts."""
        return float(getattr(config, "residual_multiplier", 1.0)) if self.down_adds_to_residual else None

    def as_cut(self, block: torch.nn.Module, kind: UnitKind, kept: Sequence[int]) -> AbstractContextManager[None]:
        """Let a block that is not cut yet compute the units that stay as the cut one will."""
        return nullcontext()

    # ---- what the config holds

    def widths(self, layer_config: Any, index: int, num_units: dict[str, int]) -> dict[str, int]:
        """Return the config keys of block `index` when it keeps `num_units` of each kind (channels of one expert)."""
        heads = num_units[ATTENTION] * (layer_config.num_attention_heads // layer_config.num_key_value_heads)
        attention = {"num_key_value_heads": num_units[ATTENTION], "num_attention_heads": heads}
        return attention | {self.channels_key: num_units[MLP]}

    def is_plain(self, config: Any, widths: dict[str, int]) -> bool:
        """Whether the family's own code builds blocks of these widths when they are the global ones."""
        return True

    def head_dim(self, config: Any) -> int:
        """Return the rows of a head."""
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def keep_blocks(self, config: Any, kept: list[int]) -> None:
        """Shorten what the config lists by block; `num_hidden_layers` is the caller's."""
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [config.layer_types[index] for index in kept]

    # ---- how a block of other widths is built

    def build_config(self, config: Any, index: int) -> Any:
        """Return the config that the block's own class is given."""
        return config.per_layer_config[index]

    def after_build(self, block: Any, config: Any, index: int) -> None:
        """Resize what the block's own class cannot build from `build_config`."""

    def after_cut(self, model: Any) -> None:
        """Update what a model copied from its config when it was built."""


@dataclass(frozen=True)
class DerivedHeadFamily(Family):
    """Families whose every head has keys and values, and whose block takes hidden size / heads for the head size.

    A block with fewer heads is built with all of them and resized; attention of fewer heads is never plain.
    """

    def key_value_heads(self, config: Any) -> int:
        return int(config.num_attention_heads)

    def widths(self, layer_config: Any, index: int, num_units: dict[str, int]) -> dict[str, int]:
        return {"num_attention_heads": num_units[ATTENTION], self.channels_key: num_units[MLP]}

    def is_plain(self, config: Any, widths: dict[str, int]) -> bool:
        return bool(widths["num_attention_heads"] * self.head_dim(config) == config.hidden_size)

    def build_config(self, config: Any, index: int) -> Any:
        layer_config = config.per_layer_config[index]
        if layer_config is not config:
            layer_config.num_attention_heads = config.hidden_size // self.head_dim(config)
        return layer_config

    def after_build(self, block: Any, config: Any, index: int) -> None:
        columns = config.per_layer_config[index].num_attention_heads * self.head_dim(config)
        rows, (output,) = self.attention_projections().values()
        if columns == block.get_submodule(output).in_features:
            return
        for path in rows:
            block.set_submodule(path, _resized(block.get_submodule(path), columns * 3 // len(rows), config.hidden_size))
        block.set_submodule(output, _resized(block.get_submodule(output), config.hidden_size, columns))


@dataclass(frozen=True)
class DividedFamily(Family):
    """Families whose config refuses a hidden size that is no multiple of the query heads, whatever the head size."""

    def is_plain(self, config: Any, widths: dict[str, int]) -> bool:
        return bool(config.hidden_size % widths["num_attention_heads"] == 0)


def _resized(linear: Any, rows: int, columns: int) -> torch.nn.Linear:
    """Make an empty layer of another size with the device, dtype and bias of the old one."""
    import torch

    options = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    return torch.nn.Linear(columns, rows, bias=linear.bias is not None, **options)
