"""OPT: biases everywhere, no gate, and an MLP whose two layers are children of the block."""

from dataclasses import dataclass
from typing import Any

from qpruner.models.families.family import DerivedHeadFamily


@dataclass(frozen=True)
class Opt(DerivedHeadFamily):
    """OPT: q, k and v are named as in Llama, and in OPT-350m the norms follow the sublayers."""

    def attention_projections(self) -> dict[str, tuple[str, ...]]:
        return super().attention_projections() | {"o": ("self_attn.out_proj",)}

    def mlp_projections(self) -> dict[str, tuple[str, ...]]:
        return {"up": ("fc1",), "down": ("fc2",)}

    def residual_factor(self, config: Any) -> float | None:
        return 1.0 if config.do_layer_norm_before else None

    def after_build(self, block: Any, config: Any, index: int) -> None:
        super().after_build(block, config, index)
        block.self_attn.num_heads = config.per_layer_config[index].num_attention_heads


OPT = Opt(
    "opt",
    "OPTDecoderLayer",
    "model.decoder.layers",
    "model.decoder.embed_tokens",
    mlp="",
    channels_key="ffn_dim",
    has_learned_positions=True,
)
