"""The base of every section of a configuration."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

Idle = tuple[str, Iterable[str]]
"""A reason, and the keys that have no effect because of it."""


class Section(BaseModel):
    """Base of every section of the configuration, which is frozen.

    Unknown keys, infinities, and booleans in place of other values are refused.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    rules: ClassVar[Callable[[Any], Iterable[str]]] = lambda _: ()
    """Yields a message for each broken rule between keys; `qpruner.config.rules` sets it."""
    idle_keys: ClassVar[Callable[[Any], Iterable[Idle]]] = lambda _: ()
    """Yields the reasons for keys without effect; `qpruner.config.rules` sets it."""

    def is_set(self, key: str) -> bool:
        """Return whether a key differs from its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    def ignored(self) -> dict[str, str]:
        """Return the keys that are set without effect, each with the first reason."""
        reasons: dict[str, str] = {}
        for reason, keys in type(self).idle_keys(self):
            for key in keys:
                if self.is_set(key):
                    reasons.setdefault(key, reason)
        return reasons

    def in_effect(self) -> Self:
        """Return a copy of the section in which every key without effect is set to its default."""
        fields = type(self).model_fields
        return self.model_copy(update={key: fields[key].default for key in self.ignored()})

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError(
                f"must not be a boolean, got {value} (YAML reads yes, no, on and off as booleans): "
                "give a number, or quote a word such as 'no'"
            )
        return value

    @field_validator("*")
    @classmethod
    def _name_each_once(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            names = [item for item in value if isinstance(item, str)]
            if len(set(names)) < len(names):
                raise ValueError(f"must name each once, got {', '.join(names)}")
        return value

    @model_validator(mode="after")
    def _obey_rules(self) -> Self:
        problems = list(type(self).rules(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self
