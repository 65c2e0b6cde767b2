"""Mixtral: the attention of Llama, and experts whose weights are stacked in one parameter per projection."""

import functools
from dataclasses import dataclass
from typing import Any

from qpruner.models.families.family import EXPERT, MLP, Family, UnitKind, UnitSlice


@dataclass(frozen=True)
class MixtureFamily(Family):
    """A mixture-of-experts family, with all experts of a block stacked in one parameter per projection.

    `mlp.experts.gate_up_proj` is ``(experts, 2 * channels, hidden)``, `mlp.experts.down_proj`
    ``(experts, hidden, channels)``, the router `mlp.gate.weight` ``(experts, hidden)``.
    """

    down_adds_to_residual: bool = False
    unquantizable: tuple[str, ...] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    experts_key: str = "num_local_experts"
    expert_channels_key: str = "intermediate_size"  # channels of one expert

    def projections(self) -> dict[str, tuple[str, ...]]:
        return self.attention_projections()

    def unit_kinds(self, layer_config: Any, index: int) -> tuple[UnitKind, ...]:
        """List attention units, whole experts with their router rows, and the channels inside each expert."""
        experts, channels = getattr(layer_config, self.experts_key), getattr(layer_config, self.expert_channels_key)
        names = ("mlp.experts.gate_up_proj", "mlp.gate.weight", "mlp.experts.down_proj")
        whole = tuple(UnitSlice(name, 0, 1) for name in names)
        stacked = (
            UnitSlice("mlp.experts.gate_up_proj", 1, 1),
            UnitSlice("mlp.experts.gate_up_proj", 1, 1, offset=channels),
            UnitSlice("mlp.experts.down_proj", 2, 1),
        )
        return (
            self.attention_kind(layer_config),
            UnitKind(EXPERT, experts, whole, least=layer_config.num_experts_per_tok),  # as many as a token is sent to
            UnitKind(MLP, experts * channels, stacked, partitions=experts),
        )

    def widths(self, layer_config: Any, index: int, num_units: dict[str, int]) -> dict[str, int]:
        widths = super().widths(layer_config, index, num_units)
        channels = widths.pop(self.channels_key)
        return widths | {self.experts_key: num_units[EXPERT], self.expert_channels_key: channels}

    def after_build(self, block: Any, config: Any, index: int) -> None:
        """Pad router logits to the full number of experts, because the balancing loss joins those of all blocks."""
        router: Any = getattr(block.mlp, "gate", None)
        if router is not None and (missing := getattr(config, self.experts_key) - len(router.weight)) > 0:
            router.register_forward_hook(functools.partial(_widen_logits, missing=missing))

    def after_cut(self, model: Any) -> None:
        model.num_experts = getattr(model.config, self.experts_key)


def _widen_logits(router: Any, args: Any, output: tuple[Any, ...], missing: int) -> tuple[Any, ...]:
    """Pad router logits with minus infinity for removed experts; routing itself does not read these logits."""
    from torch.nn.functional import pad

    return (pad(output[0], (0, missing), value=float("-inf")), *output[1:])


MIXTRAL = MixtureFamily("mixtral", "MixtralDecoderLayer")
