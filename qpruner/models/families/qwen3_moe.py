"""Qwen3-MoE: the attention of Qwen3, experts in most blocks and a dense MLP in the others."""

from dataclasses import dataclass
from typing import Any

from qpruner.models.families.family import MLP, UnitKind
from qpruner.models.families.mixtral import MixtureFamily


@dataclass(frozen=True)
class Qwen3Moe(MixtureFamily):
    """Qwen3-MoE, with a dense MLP in blocks of `mlp_only_layers` and in blocks that `decoder_sparse_step` skips."""

    def unit_kinds(self, layer_config: Any, index: int) -> tuple[UnitKind, ...]:
        if self._has_experts(layer_config, index):
            return super().unit_kinds(layer_config, index)
        return (self.attention_kind(layer_config), self.mlp_kind(layer_config))

    def widths(self, layer_config: Any, index: int, num_units: dict[str, int]) -> dict[str, int]:
        experts, channels = layer_config.num_experts, layer_config.moe_intermediate_size
        if self._has_experts(layer_config, index):
            dense = {"intermediate_size": layer_config.intermediate_size}
            return super().widths(layer_config, index, num_units) | dense
        widths = super().widths(layer_config, index, num_units | {"expert": experts})
        return widths | {"moe_intermediate_size": channels, "intermediate_size": num_units[MLP]}

    def keep_blocks(self, config: Any, kept: list[int]) -> None:
        super().keep_blocks(config, kept)
        # Which blocks are dense depends on their position, so list them before positions change.
        config.mlp_only_layers = [new for new, old in enumerate(kept) if not self._has_experts(config, old)]
        config.decoder_sparse_step = 1

    def _has_experts(self, config: Any, index: int) -> bool:
        return index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0


QWEN3_MOE = Qwen3Moe(
    "qwen3_moe",
    "Qwen3MoeDecoderLayer",
    experts_key="num_experts",
    expert_channels_key="moe_intermediate_size",
)
