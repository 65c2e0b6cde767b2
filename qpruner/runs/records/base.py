"""Base classes of records, and digests of values."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, WithJsonSchema

RUN_ID = "run.id"
"""File with the id of the run; if it is missing, the storage cannot be reached or the run is new.
"""

StandardError = Annotated[float, WithJsonSchema({"type": ["number", "null"]}, mode="serialization")]
"""A standard error; if there is only one question or row, NaN here and null in JSON."""


class Recorded(BaseModel):
    """Base class of all recorded data: immutable, made of plain values."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


class Record(Recorded):
    """Base class of the records of stages."""

    digest: str
    seconds: float
    gpu_seconds: float = 0.0
    """Seconds of work times the number of GPUs reserved for it; 0 without GPUs."""


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one level: `field.key` -> value."""
    flattened: dict[str, Any] = {}
    for name, value in fields.items():
        flattened |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return flattened


def digest_of(*parts: Any) -> str:
    """Return the digest of some values.

    It is the first 16 hex digits of the sha256 of their canonical JSON.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} cannot be part of a digest")
