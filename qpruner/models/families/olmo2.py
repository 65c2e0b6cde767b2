"""OLMo 2: query and key norms over all heads together, so their weights are cut with the heads.

After a cut the norms average over the kept heads only; `Olmo2.as_cut` makes them do so before.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qpruner.models.families.family import Family, UnitKind, UnitSlice


@dataclass(frozen=True)
class Olmo2(Family):
    """OLMo 2, where an attention unit also owns its entries of the query and key norms."""

    def attention_kind(self, layer_config: Any) -> UnitKind:
        kind = super().attention_kind(layer_config)
        queries, keys, *_ = kind.slices
        q_norm = UnitSlice("self_attn.q_norm.weight", 0, queries.width)
        k_norm = UnitSlice("self_attn.k_norm.weight", 0, keys.width)
        return replace(kind, slices=(q_norm, k_norm, *kind.slices))

    @contextmanager
    def as_cut(self, block: Any, kind: UnitKind, kept: Sequence[int]) -> Iterator[None]:
        """Make the query and key norms average over the kept heads only."""
        with ExitStack() as hooks:
            norms = [item for item in kind.slices if item.parameter.endswith("_norm.weight")]
            for item in norms:
                stays = [unit * item.width + row for unit in kept for row in range(item.width)]
                norm = block.get_submodule(item.parameter.removesuffix(".weight"))
                hook = norm.register_forward_hook(partial(_normed_over, stays=stays))
                hooks.callback(hook.remove)
            yield


def _normed_over(norm: Any, args: tuple[Any], output: Any, stays: list[int]) -> Any:
    """Compute an RMS norm whose mean is over the entries `stays` only."""
    hidden = args[0].float()
    mean_square = hidden[..., stays].square().mean(-1, keepdim=True)
    scaled = hidden * (mean_square + norm.variance_epsilon).rsqrt()
    return (norm.weight * scaled.to(output.device)).to(output.dtype)


OLMO2 = Olmo2("olmo2", "Olmo2DecoderLayer", down_adds_to_residual=False)
