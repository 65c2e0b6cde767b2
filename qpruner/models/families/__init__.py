"""Where each model family keeps its projections, and what a pruning unit of it consists of.

A family is one file in this folder that makes a `Family` instance; it is found here by itself. Everything outside asks
`family_of(config)`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from qpruner.errors import UserError
from qpruner.models.families.family import ATTENTION, EXPERT, MLP, Family, UnitKind, UnitSlice, owned_parameters

__all__ = ["ATTENTION", "EXPERT", "MLP", "Family", "UnitKind", "UnitSlice", "families", "family_of", "owned_parameters"]


@functools.cache
def families() -> dict[str, Family]:
    """Every family by its `model_type`, from the files of this folder."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Family)]
    return {family.model_type: family for family in sorted(found, key=lambda family: family.model_type)}


def family_of(config: Any) -> Family:
    """Find the family of a transformers config; `UserError` with the supported list when there is none."""
    family = families().get(config.model_type)
    if family is None:
        raise UserError(
            f"`model.source`: architecture `{config.model_type}` is not supported; supported: {', '.join(families())}. "
            "A new family is one file: docs/families.md says how"
        )
    return family
