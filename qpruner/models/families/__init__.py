"""Describe the supported model families, one file each.

A family says where projections are, and which weights a pruning unit owns.
"""

import functools
import importlib
import pkgutil
from typing import Any

from qpruner.errors import UserError
from qpruner.models.families.family import (
    ATTENTION,
    MLP,
    Family,
    UnitKind,
    UnitSlice,
    owned_parameters,
)

__all__ = [
    "ATTENTION",
    "MLP",
    "Family",
    "UnitKind",
    "UnitSlice",
    "block_paths",
    "families",
    "family_of",
    "owned_parameters",
]


@functools.cache
def families() -> dict[str, Family]:
    """Map each `model_type` to its family, from the files of this folder."""
    by_type: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, Family):
                by_type[value.model_type] = value
    return dict(sorted(by_type.items()))


def family_of(config: Any) -> Family:
    """Return the family of a transformers config; raise `UserError` if it is not supported."""
    if config.model_type not in families():
        raise UserError(
            f"`model.source`: architecture `{config.model_type}` is not supported; "
            f"supported: {', '.join(families())}. To add a family, see docs/families.md"
        )
    return families()[config.model_type]


def block_paths(config: Any) -> list[str]:
    """List the paths of the blocks of a model."""
    return list(map(family_of(config).block_path, range(config.num_hidden_layers)))
