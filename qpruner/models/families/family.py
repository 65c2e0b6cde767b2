"""Describe a model family: its layers, their shapes, and which weights form a pruning unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = "attention"
"""Kind of unit: a key/value head with its query heads."""
MLP = "mlp"
"""Kind of unit: an MLP channel."""
Groups = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
"""Maps the name of a group to the paths of its linear layers and of the modules at its end.

The layers of a group share a format.
"""


@dataclass(frozen=True)
class UnitSlice:
    """The part of one parameter that a unit owns; in linear layers also those entries of the bias.

    Unit ``i`` owns indices ``offset + i * width`` to ``offset + (i + 1) * width`` along ``dim``.
    """

    parameter: str  # path inside the decoder block
    dim: int  # of the weight (rows, columns) of a linear layer: 0 cuts outputs, 1 inputs
    width: int
    offset: int = 0  # start of the first unit, in fused layers
    heads: int = 1  # query heads in the width, if a key/value head has several


@dataclass(frozen=True)
class UnitKind:
    """One kind of pruning unit in a block: `attention` or `mlp`."""

    name: str
    num_units: int
    slices: tuple[UnitSlice, ...]

    @property
    def output_linear(self) -> str:
        """Path of the linear layer whose columns the units own (o, down)."""
        cut_columns = [item for item in self.slices if item.dim == 1]
        return cut_columns[-1].parameter.removesuffix(".weight")


def owned_parameters(
    block: torch.nn.Module, kind: UnitKind
) -> Iterator[tuple[UnitSlice, torch.nn.Parameter]]:
    """Yield every parameter that units of a kind own parts of, with the slice that they own.

    Biases are included.
    """
    for item in kind.slices:
        yield item, block.get_parameter(item.parameter)
        path, _, name = item.parameter.rpartition(".")
        bias = getattr(block.get_submodule(path), "bias", None)
        if item.dim == 0 and name == "weight" and bias is not None:
            yield replace(item, parameter=f"{path}.bias"), bias


@dataclass(frozen=True)
class Family:
    """A model family with projections named as in Llama (q, k, v, o, gate, up, down).

    Other families override parts.
    """

    model_type: str  # transformers' `config.model_type`
    decoder_layer: str  # class of the decoder block, in transformers' modeling file of this family
    blocks: str = "model.layers"  # path of the list of blocks in the model
    embeddings: str = "model.embed_tokens"  # path of the token embeddings in the model
    head: str = "lm_head"  # path of the layer that computes the logits
    attention: str = "self_attn"  # path of the attention module in a block
    mlp: str = "mlp"  # path of the MLP in a block; '' if its layers are children of the block
    channels_key: str = "intermediate_size"  # config key of the MLP's width
    has_learned_positions: bool = False  # positions come from a table of limited length
    down_adds_to_residual: bool = True  # False if a norm follows the MLP
    gguf: str = ""
    """llama.cpp's architecture of such models; '' if we do not write GGUF files of them."""
    gguf_ragged: str = ""
    """llama.cpp's architecture that takes their blocks at different widths; '' if none does."""

    @property
    def module(self) -> str:
        """Name of transformers' module with the class `decoder_layer`."""
        name = self.model_type.removesuffix("_text")
        return f"transformers.models.{name}.modeling_{name}"

    def block_path(self, index: int) -> str:
        """Return the path of block `index` in the model."""
        return f"{self.blocks}.{index}"

    # ---- projections and groups

    def attention_projections(self) -> dict[str, tuple[str, ...]]:
        """Map `qkv` and `o` to the paths of their linear layers in a block."""
        return {
            "qkv": tuple(f"{self.attention}.{name}_proj" for name in "qkv"),
            "o": (f"{self.attention}.o_proj",),
        }

    def mlp_projections(self) -> dict[str, tuple[str, ...]]:
        """Map each MLP projection to the paths of its layers in a block.

        Gate and up are one projection; the output comes last.
        """
        return {
            "gate_up": (f"{self.mlp}.gate_proj", f"{self.mlp}.up_proj"),
            "down": (f"{self.mlp}.down_proj",),
        }

    def projections(self) -> dict[str, tuple[str, ...]]:
        """Map each projection that can be quantized to the paths of its layers in a block."""
        return self.attention_projections() | self.mlp_projections()

    def groups(self, grouping: str) -> Groups:
        """Map the groups into which `grouping` divides a block to their layers and outputs.

        `grouping` is `quantize.group`; '' names the block as one group.
        """
        projections = self.projections()
        if grouping == "projection":
            return {name: (paths, paths) for name, paths in projections.items()}
        attention = projections.pop("qkv") + projections.pop("o")
        mlp = tuple(path for paths in projections.values() for path in paths)
        if grouping == "block":
            return {"": (attention + mlp, ("",))}
        return {
            "attention": (attention, (self.attention,)),
            "mlp": (mlp, (self.mlp,) if self.mlp else mlp[-1:]),
        }

    # ---- pruning units

    def unit_kinds(self, layer_config: Any) -> tuple[UnitKind, ...]:
        """List the unit kinds of a block from its layer config."""
        return (self.attention_kind(layer_config), self.mlp_kind(layer_config))

    def key_value_heads(self, config: Any) -> int:
        """Return the number of key/value heads per block."""
        return int(config.num_key_value_heads)

    def attention_kind(self, layer_config: Any) -> UnitKind:
        """Describe the attention units: key/value heads with their query heads."""
        head_dim = self.head_dim(layer_config)
        groups = self.key_value_heads(layer_config)
        heads = layer_config.num_attention_heads // groups
        width = heads * head_dim  # of the queries
        (queries, keys, values), (output,) = self.attention_projections().values()
        slices = (
            UnitSlice(f"{queries}.weight", 0, width, heads=heads),
            UnitSlice(f"{keys}.weight", 0, head_dim),
            UnitSlice(f"{values}.weight", 0, head_dim),
            UnitSlice(f"{output}.weight", 1, width, heads=heads),
        )
        return UnitKind(ATTENTION, groups, slices)

    def mlp_kind(self, layer_config: Any) -> UnitKind:
        """Describe the MLP units: channels.

        A channel is a row of gate, a row of up and a column of down.
        """
        *rows, output = (path for paths in self.mlp_projections().values() for path in paths)
        slices = [UnitSlice(f"{path}.weight", 0, 1) for path in rows]
        slices.append(UnitSlice(f"{output}.weight", 1, 1))
        return UnitKind(MLP, getattr(layer_config, self.channels_key), tuple(slices))

    def residual_factor(self, config: Any) -> float | None:
        """Return the factor of `down` in the residual stream, or None if a norm follows `down`."""
        if not self.down_adds_to_residual:
            return None
        return float(getattr(config, "residual_multiplier", 1.0))

    def as_cut(
        self, block: torch.nn.Module, kind: UnitKind, kept: Sequence[int]
    ) -> AbstractContextManager[None]:
        """Make the kept units of a block compute, in this context, what they will after the cut."""
        return nullcontext()

    # ---- config keys

    def widths(self, layer_config: Any, num_units: dict[str, int]) -> dict[str, int]:
        """Return the config keys and values for `num_units` of each kind in a block."""
        groups = num_units[ATTENTION]
        heads_a_group = layer_config.num_attention_heads // layer_config.num_key_value_heads
        return {
            "num_key_value_heads": groups,
            "num_attention_heads": groups * heads_a_group,
            self.channels_key: num_units[MLP],
        }

    def is_plain(self, config: Any, widths: dict[str, int]) -> bool:
        """Return True if a checkpoint with these widths in all blocks loads without qpruner."""
        return True

    def head_dim(self, config: Any) -> int:
        """Return the head size."""
        return int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )

    # ---- building blocks of other widths

    def build_config(self, config: Any, index: int) -> Any:
        """Return the config from which transformers builds block `index`."""
        return config.per_layer_config[index]

    def after_build(self, block: Any, config: Any, index: int) -> None:
        """Resize the layers that transformers cannot build in the right size by itself."""


@dataclass(frozen=True)
class DerivedHeadFamily(Family):
    """A family without grouped heads, whose head size follows from the number of heads.

    Plain checkpoints have a head size of hidden size / heads.
    """

    def key_value_heads(self, config: Any) -> int:
        return int(config.num_attention_heads)

    def widths(self, layer_config: Any, num_units: dict[str, int]) -> dict[str, int]:
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
        old_output = block.get_submodule(output)
        if columns == old_output.in_features:
            return
        num_rows = columns * 3 // len(rows)  # q, k and v are three layers, or one
        for path in rows:
            old = block.get_submodule(path)
            block.set_submodule(path, _resized(old, num_rows, config.hidden_size))
        block.set_submodule(output, _resized(old_output, config.hidden_size, columns))


@dataclass(frozen=True)
class DividedFamily(Family):
    """A family whose config needs a hidden size divisible by the number of query heads.

    This holds whatever the head size is.
    """

    def is_plain(self, config: Any, widths: dict[str, int]) -> bool:
        return bool(config.hidden_size % widths["num_attention_heads"] == 0)


def _resized(linear: Any, rows: int, columns: int) -> torch.nn.Linear:
    """Create an empty layer of another size, with the device, dtype and bias of the old layer.

    It has a bias only if the old layer has one.
    """
    import torch

    return torch.nn.Linear(
        columns,
        rows,
        bias=linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
