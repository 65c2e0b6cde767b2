"""Build models whose decoder blocks have different widths.

transformers 5.24 reads and writes `per_layer_config`, but its blocks ignore it
(huggingface/transformers#45332), so this module builds each block from its own layer config.
"""

import functools
import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qpruner.models.families import Family, families, family_of

_FOLLOWED = "qpruner_model_config"
_ATTENTION = "_attn_implementation_internal"


# transformers warns that a global width was read, which is harmless: blocks are built from their
# own configs.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
    lambda record: "Reading global config value for per-layer attribute" not in record.getMessage()
)


def install(family: Family | None = None) -> None:
    """Make block i of a family be built from `config.per_layer_config[i]`.

    None stands for all families. Further calls do nothing.
    """
    if family is None:
        for known_family in families().values():  # to import all their modules takes 0.2 s
            install(known_family)
        return
    block_class = getattr(importlib.import_module(family.module), family.decoder_layer)
    if not getattr(block_class.__init__, "reads_per_layer_config", False):
        block_class.__init__ = _ragged(family, block_class.__init__)


def _ragged(family: Family, original: Any) -> Any:
    """Wrap a block constructor so that it builds the block from its own layer config."""

    @functools.wraps(original)
    def build(self: Any, config: Any, layer_idx: int) -> None:
        original(self, _following(family.build_config(config, layer_idx), config), layer_idx)
        family.after_build(self, config, layer_idx)

    build.reads_per_layer_config = True  # type: ignore[attr-defined]
    return build


def _following(layer_config: Any, config: Any) -> Any:
    """Make a layer config read the attention implementation of the model config at every access."""
    if layer_config is not config:
        config_class: Any = type(config)
        layer_config.__class__ = _following_class(config_class)
        layer_config.__dict__[_FOLLOWED] = config
    return layer_config


@functools.cache
def _following_class(config_class: type) -> type:
    followed = property(lambda self: getattr(self.__dict__[_FOLLOWED], _ATTENTION))
    return type(config_class.__name__, (config_class,), {_ATTENTION: followed})


def set_widths(config: Any, num_units: Mapping[int, Mapping[str, int]]) -> None:
    """Write the widths of cut blocks into a config: once if all are equal, otherwise per block.

    `num_units` maps the index of a block and a kind of unit to the number of units kept.
    """
    family = family_of(config)
    widths = {}
    for index in range(config.num_hidden_layers):
        layer_config = config.per_layer_config[index]
        present = {kind.name: kind.num_units for kind in family.unit_kinds(layer_config)}
        widths[index] = family.widths(layer_config, present | dict(num_units.get(index, {})))

    # Without an explicit head size transformers derives it from the (now per-layer) number of
    # heads.
    config.head_dim = family.head_dim(config.per_layer_config[0])
    config.per_layer_config = None
    config.allow_global_per_layer_attribute_access = True

    first = widths[0]
    are_equal = all(block_widths == first for block_widths in widths.values())
    if are_equal and family.is_plain(config, first):
        for key, value in first.items():
            setattr(config, key, value)
        config.__dict__.pop("allow_global_per_layer_attribute_access")
    else:
        config.per_layer_config = widths


def keep_blocks(config: Any, kept: Sequence[int]) -> None:
    """Remove all blocks from a config except `kept`, their indices in ascending order."""
    overrides: Mapping[int, Any] = {}
    if config.is_heterogeneous:
        overrides = config._heterogeneity_spec.per_layer_overrides
    config.per_layer_config = None
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = len(kept)
    if overrides:
        config.per_layer_config = {new: overrides.get(old, {}) for new, old in enumerate(kept)}
