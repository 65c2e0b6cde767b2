"""What a model card states in its front matter, and which keys of the configuration state what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

STATED = {"base_model": "base model", "license": "licence", "datasets": "datasets"}
"""What the section `card` can state: its keys, which are the card's own, as people call them."""


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card; nothing where it has none or they cannot be read."""
    block = REGEX_YAML_BLOCK.search(card.removeprefix("\N{BOM}"))
    try:
        metadata = yaml.safe_load(block[2]) if block else None
    except yaml.YAMLError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {}


def lacking(card: str) -> tuple[str, ...]:
    """The keys of `STATED` that a card does not have."""
    metadata = front_matter(card)
    return tuple(key for key in STATED if metadata.get(key) is None)


def told_lacking(keys: Sequence[str]) -> str | None:
    """What a card lacks and what states it, in a sentence; None where it lacks nothing."""
    if not keys:
        return None
    names, stated_by = ", ".join(STATED[key] for key in keys), ", ".join(f"`card.{key}`" for key in keys)
    return f"the model card does not state: {names}; set {stated_by} and repeat `qpruner run`, which writes it anew"
