"""OPT: biases everywhere, no gate, the MLP's two layers lie in the block itself."""

from dataclasses import dataclass
from typing import Any

from qpruner.models.families.family import ATTENTION, MLP, DerivedHeadFamily, UnitKind, UnitSlice, resized


@dataclass(frozen=True)
class Opt(DerivedHeadFamily):
    """As many key/value heads as query heads; the MLP's width is `ffn_dim`."""

    def projections(self) -> dict[str, tuple[str, ...]]:
        return {
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": ("self_attn.out_proj",),
            "up": ("fc1",),
            "down": ("fc2",),
        }

    def attention_kind(self, layer_config: Any) -> UnitKind:
        head_dim = self.head_dim(layer_config)
        rows = tuple(UnitSlice(f"self_attn.{name}_proj.weight", 0, head_dim) for name in "qkv")
        columns = UnitSlice("self_attn.out_proj.weight", 1, head_dim)
        return UnitKind(ATTENTION, layer_config.num_attention_heads, (*rows, columns))

    def mlp_kind(self, layer_config: Any) -> UnitKind:
        slices = (UnitSlice("fc1.weight", 0, 1), UnitSlice("fc2.weight", 1, 1))
        return UnitKind(MLP, layer_config.ffn_dim, slices)

    def residual_factor(self, config: Any) -> float | None:
        return 1.0 if config.do_layer_norm_before else None

    def widths(self, layer_config: Any, index: int, num_units: dict[str, int]) -> dict[str, int]:
        return {"num_attention_heads": num_units[ATTENTION], "ffn_dim": num_units[MLP]}

    def after_build(self, block: Any, config: Any, index: int) -> None:
        heads = config.per_layer_config[index].num_attention_heads
        attention, columns = block.self_attn, heads * self.head_dim(config)
        if heads == attention.num_heads:
            return
        attention.num_heads = heads
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, resized(getattr(attention, name), columns, config.hidden_size))
        attention.out_proj = resized(attention.out_proj, config.hidden_size, columns)


OPT = Opt(
    "opt",
    ("transformers.models.opt.modeling_opt", "OPTDecoderLayer"),
    "model.decoder.layers",
    mlp="",
    has_learned_positions=True,
)
