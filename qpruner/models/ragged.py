"""Decoder blocks of different widths in one model.

transformers 5.24 reads and writes `per_layer_config` but its Llama and Qwen blocks do not look at it yet
(huggingface/transformers#45332), so each block is built from its own layer config here. Once transformers does that
itself, this module goes and the checkpoints stay as they are.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

from qpruner.models.structure import FAMILIES, Family, family_of


class _GlobalReadFilter(logging.Filter):
    """Drops transformers' warning that a global value was read on a ragged config.

    It warns once for each per-layer key while the config is copied and validated; the blocks are built from their own.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "Reading global config value for per-layer attribute" not in record.getMessage()


def install() -> None:
    """Make every supported family build each block from `config.per_layer_config[i]`; idempotent, imports nothing."""
    logger = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    if not any(isinstance(existing, _GlobalReadFilter) for existing in logger.filters):
        logger.addFilter(_GlobalReadFilter())
    for family in FAMILIES:
        _install_family(family)


def _install_family(family: Family) -> None:
    module_name, class_name = family.decoder_layer
    block = getattr(importlib.import_module(module_name), class_name)
    original = block.__init__
    if getattr(original, "reads_per_layer_config", False):
        return

    @functools.wraps(original)
    def build(self: Any, config: Any, layer_idx: int) -> None:
        original(self, config.per_layer_config[layer_idx], layer_idx)

    build.reads_per_layer_config = True  # type: ignore[attr-defined]
    block.__init__ = build


def set_widths(config: Any, kept: dict[int, dict[str, int]]) -> None:
    """Write the widths of the cut blocks into a config.

    Args:
        config: The model's config; changed in place.
        kept: Block index -> kind of unit -> units kept.
    """
    family = family_of(config)
    overrides = {
        index: family.layer_overrides(config.per_layer_config[index], num_units) for index, num_units in kept.items()
    }
    # Without an explicit head size transformers derives it from the (now per-layer) number of heads.
    config.head_dim = family.head_dim(config.per_layer_config[0])
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = overrides
