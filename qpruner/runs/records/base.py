"""Base classes of what a run records, and digests."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, WithJsonSchema

if TYPE_CHECKING:
    import pandas

RUN_ID = "run.id"
"""The file that tells a run from another in a folder of this name, and shows that its storage is there."""

StandardError = Annotated[float, WithJsonSchema({"type": ["number", "null"]}, mode="serialization")]
"""NaN over a single question or row, which JSON knows as null."""


class Recorded(BaseModel):
    """Base of what is recorded: plain data that never changes."""

    # A standard error over one question or row is NaN.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants")

    def to_dataframe(self) -> pandas.DataFrame:
        """As a table: a row for each of what the record lists; one row of its figures where it lists nothing."""
        import pandas

        return pandas.DataFrame(self.table_rows())

    def _repr_html_(self) -> str:
        return str(self.to_dataframe()._repr_html_())

    listed: ClassVar[str] = ""
    """Name of the field with what is listed in a table."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return the rows of `to_dataframe`, with a column a field, `FIELD.KEY` of mappings, and `bits of GROUP`."""
        if self.listed:
            return [row for each in getattr(self, self.listed) for row in each.table_rows()]
        fields = self.model_dump()
        plan = fields.pop("plan", {})
        return [flat(fields) | {f"bits of {group}": bits for group, bits in plan.items()}]


class Record(Recorded):
    """Base of every stage's record."""

    digest: str
    seconds: float
    gpu_seconds: float = 0.0
    """Seconds at work times the GPUs that were held for it; 0 where there are none."""


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`field.key` -> value, however deep."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def digest_of(*parts: Any) -> str:
    """Digest values: the first 16 hex digits of the sha256 of their canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} cannot be part of a digest")
