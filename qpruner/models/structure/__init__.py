"""Where each model family keeps its projections, and what a pruning unit of it consists of.

A family is one file in this folder: a `Family` and nothing else. Everything outside asks `family_of(config)`.
"""

from __future__ import annotations

from typing import Any

from qpruner.errors import UserError
from qpruner.models.structure.family import Family, UnitKind, UnitSlice
from qpruner.models.structure.llama import LLAMA, MISTRAL
from qpruner.models.structure.qwen import QWEN2, QWEN3

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3)

__all__ = ["FAMILIES", "Family", "UnitKind", "UnitSlice", "family_of", "family_of_type"]


def family_of(config: Any) -> Family:
    """The family of a transformers config; `UserError` with the supported list when there is none."""
    return family_of_type(config.model_type)


def family_of_type(model_type: str) -> Family:
    """The family of a `model_type`; `UserError` with the supported list when there is none."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    supported = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(
        f"`model.source`: architecture `{model_type}` is not supported; supported: {supported}. "
        "A new family is one file in qpruner/models/structure/"
    )
