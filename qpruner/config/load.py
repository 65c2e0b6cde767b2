"""Load a configuration: read YAML, apply overrides, and report all problems at once."""

import difflib
import json
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from qpruner.config.schema import HUB_ID, LICENSE_ID, RunConfig
from qpruner.errors import ConfigError, UserError
from qpruner.wording import counted

PATTERNS = {
    HUB_ID.pattern: "must be a hub id, OWNER/NAME or NAME, such as HuggingFaceTB/SmolLM2-135M",
    LICENSE_ID: (
        "must be the hub's identifier of a licence, in small letters without spaces, such as "
        "apache-2.0"
    ),
}
"""The rule in words for each regular expression of the schema."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys; PyYAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key}` is given twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str) -> Any:
    """Parse a YAML or JSON text; raise `yaml.YAMLError` if it is invalid or gives a key twice."""
    return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and validate a YAML file; raise a `UserError` that lists all problems.

    An override is `section.key=value`, with the value in YAML. Items of a list are numbered from 0
    (`data.train.0.limit=8`). `section.key=` removes the key, so that its default holds.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; give a configuration file (of a run, the file that started it)"
        )
    examples = "see tune_configs/ for complete examples"
    if not path.is_file():
        raise UserError(f"configuration file {path} does not exist; {examples}")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        remedy = "correct it"
        if "'\\t'" in str(error):
            remedy = "replace its tabs by spaces, two for each level"
        raise UserError(f"{path} is not valid YAML: {error}; {remedy}, or {examples}") from error
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} must be a mapping of sections, got {type(raw).__name__}; {examples}"
        )
    for override in overrides or []:
        _apply_override(raw, override)
    return validate_config(raw, f"{path}, overrides included" if overrides else str(path))


def validate_config(raw: dict[str, Any], source: str | None = None) -> RunConfig:
    """Build a `RunConfig` from plain data; raise a `ConfigError` that lists all problems."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        # If items of a list are wrong, pydantic also reports the list as too short.
        problems = []
        for problem in error.errors():
            if problem["type"] != "too_short" or not problem["input"]:
                problems.append(_explain(problem))
        raise ConfigError(problems, source) from error


def config_schema() -> str:
    """Return the JSON schema of the configuration, for editors."""
    return json.dumps(RunConfig.model_json_schema(), indent=2, sort_keys=True) + "\n"


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(
            f"--set takes section.key=value, such as search.max_trials=20; got {override!r}"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {override}: the value is not valid YAML: {error}; put text in quotes"
        ) from error
    *sections, last = key.split(".")
    here: Any = raw
    for section in sections:
        place = _place_in(here, section, override)
        here = here[place] if isinstance(here, list) else here.setdefault(place, {})
        if not isinstance(here, dict | list):
            raise UserError(
                f"--set {override}: `{section}` is not a section; `qpruner check --show-config` "
                "prints every key"
            )
    place = _place_in(here, last, override)
    if text.strip():
        here[place] = value
    elif isinstance(here, dict) and place not in here:
        unknown = _unknown_key([int(part) if part.isdecimal() else part for part in key.split(".")])
        problem = unknown or f"the file has no `{key}` to remove: its default holds already"
        raise UserError(f"--set {override}: {problem}")
    else:
        del here[place]


def _place_in(here: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    if isinstance(here, dict):
        return part
    if not part.isdecimal() or int(part) >= len(here):
        raise UserError(
            f"--set {override}: `{part}` must be the number of an item, counted from 0, in a list "
            f"of {counted(len(here), 'item')}; to add an item, give the whole list"
        )
    return int(part)


def _explain(problem: Any) -> str:
    """Turn a pydantic error into a sentence with the key, the value, the rule and the remedy."""
    location = list(problem["loc"])
    key = ".".join(str(part) for part in location) or "configuration"
    if problem["type"] == "extra_forbidden":
        return str(_unknown_key(location))
    if problem["type"] == "missing":
        return f"`{key}` is missing: give it as docs/configuration.md says"
    rule = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"`{key}`: {rule}" if location else rule
    # pydantic's own messages for these name Python types or a regular expression.
    limits = problem.get("ctx", {})
    rule = {
        "tuple_type": "must be a list",
        "dict_type": "must be a mapping of keys",
        "model_type": "must be a mapping of keys (a section)",
        "too_short": "must have at least 1 item",
        "string_pattern_mismatch": PATTERNS.get(limits.get("pattern"), rule),
    }.get(problem["type"], rule)
    # Every number with an upper limit is a share.
    hint = "; it is a share: 20 % is 0.2" if "le" in limits or "lt" in limits else ""
    return f"`{key}`: {rule[0].lower() + rule[1:]}, got {problem['input']!r}{hint}"


def _unknown_key(location: list[str | int]) -> str | None:
    """Describe the first unknown key on the way to a location, with the nearest known one.

    Return None if all keys are known.
    """
    for end, part in enumerate(location):
        above = location[:end]
        known = _known_keys(above)
        if isinstance(part, str) and known and part not in known:
            prefix = "".join(f"{name}." for name in above)
            nearest = [
                f"{section}.{part}" for section in known if part in _known_keys([*above, section])
            ]
            if not nearest:
                nearest = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
                nearest = [f"{prefix}{key}" for key in nearest]
            hint = f"known keys: {', '.join(sorted(known))}"
            if nearest:
                hint = f"did you mean `{nearest[0]}`?"
            return f"`{prefix}{part}` is not a known key; {hint}"
    return None


def _known_keys(location: list[str | int]) -> list[str]:
    """Return the fields of the section at a location; none if it is no section."""
    section: type[BaseModel] | None = RunConfig
    for part in location:
        if section and isinstance(part, str):
            section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields) if section else []


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        section = _section_of(argument)
        if section:
            return section
    return None
