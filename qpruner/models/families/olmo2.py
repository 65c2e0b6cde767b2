"""OLMo 2: query and key norms over all heads together, so their weights are cut with the heads.

After a cut the norms average over the kept heads only; `Olmo2.as_cut` makes them do so before.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qpruner.models.families.family import ATTENTION, Family, UnitKind, UnitSlice


@dataclass(frozen=True)
class Olmo2(Family):
    """OLMo 2, where an attention unit also owns its entries of the query and key norms."""

    def attention_kind(self, layer_config: Any) -> UnitKind:
        kind = super().attention_kind(layer_config)
        queries, keys = kind.slices[0].width, kind.slices[1].width
        norms = (
            UnitSlice("self_attn.q_norm.weight", 0, queries),
            UnitSlice("self_attn.k_norm.weight", 0, keys),
        )
        return replace(kind, slices=(*norms, *kind.slices))

    @contextmanager
    def as_cut(self, block: Any, kind: UnitKind, kept: Sequence[int]) -> Iterator[None]:
        """Make the query and key norms average over the kept heads only."""
        with ExitStack() as hooks:
            for item in kind.slices[:2] if kind.name == ATTENTION else ():
                stays = [unit * item.width + row for unit in kept for row in range(item.width)]
                norm = block.get_submodule(item.parameter.removesuffix(".weight"))
                hooks.callback(
                    norm.register_forward_hook(partial(_normed_over, stays=stays)).remove
                )
            yield


def _normed_over(norm: Any, args: tuple[Any], output: Any, stays: list[int]) -> Any:
    """Compute an RMS norm whose mean is over the entries `stays` only."""
    hidden = args[0].float()
    mean_square = hidden[..., stays].square().mean(-1, keepdim=True)
    normed = norm.weight * (hidden * (mean_square + norm.variance_epsilon).rsqrt()).to(
        output.device
    )
    return normed.to(output.dtype)


OLMO2 = Olmo2("olmo2", "Olmo2DecoderLayer", down_adds_to_residual=False)
