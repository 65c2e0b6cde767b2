"""Writes the pages that are made from the code, `configuration.md` and `commands.md`: `python docs/reference.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from qpruner.cli.main import main
from qpruner.config.schema import RunConfig

FOLDER = Path(__file__).resolve().parent
MADE = "<!-- Made from the code by `python docs/reference.py`: change it there. -->"
TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}
BOUNDS = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}


def pages() -> dict[str, str]:
    """Each page by the name of its file."""
    return {"configuration.md": configuration(), "commands.md": commands()}


def commands() -> str:
    """The page of every verb: what `--help` prints."""
    lines = [
        "# Commands",
        "",
        MADE,
        "",
        "Exit codes: 0 success, 2 a mistake in the input, 1 a failure of ours or of the machine, 130 after Ctrl-C. "
        "With `--json` the last line of stdout is one JSON object.",
        "",
        *_fenced(_help(main, "qpruner")),
    ]
    for name in main.list_commands(click.Context(main)):
        lines += [f"## qpruner {name}", "", *_fenced(_help(main.commands[name], f"qpruner {name}"))]
    return "\n".join(lines).rstrip() + "\n"


def _help(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, max_content_width=100, terminal_width=100, **main.context_settings)
    return command.get_help(context)


def _fenced(text: str) -> tuple[str, ...]:
    return ("```text", text, "```", "")


def configuration() -> str:
    """The page of every key: its type, rule, default and meaning, as the configuration's own JSON schema has them."""
    schema = RunConfig.model_json_schema()
    lines = [
        "# Configuration",
        "",
        MADE,
        "",
        "Every key of a configuration file. An unknown key is an error, and so is one that would be ignored beside "
        "others: `qpruner check` names it. On the command line any key is `--set SECTION.KEY=VALUE`, items of lists "
        "too, counted from 0 (`--set data.train.0.limit=8`); `--set SECTION.KEY=` takes a key of the file out, so that "
        "its default holds, while `KEY=null` gives it the value null. Editors complete the file with "
        "`tune_configs/schema.json`.",
        "",
        *_section("", schema, schema["$defs"], {}),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _section(path: str, schema: dict[str, Any], defined: dict[str, Any], told: dict[str, str]) -> Iterator[str]:
    """A section's table, then the sections inside it that are not `told` yet, each under the first path to it."""
    yield from (f"## {path.rstrip('.') or 'The file'}", "", " ".join(schema.get("description", "").split()), "")
    yield from ("| key | type and rule | default | meaning |", "|---|---|---|---|")
    required, inner = schema.get("required", ()), []
    for name, field in schema["properties"].items():
        default = "must be given" if name in required else _default(field)
        about, target = " ".join(field.get("description", "").split()), _referred(field)
        if target:
            if target not in told:
                told[target] = f"{path}{name}"
                inner.append(target)
            about = f"{about} Keys: [{told[target]}](#{told[target].replace('.', '')}).".lstrip()
        yield _row(f"`{path}{name}`", _type(field), default, about)
    yield ""
    for target in inner:
        yield from _section(f"{told[target]}.", defined[target], defined, told)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _referred(field: dict[str, Any]) -> str | None:
    """The name of the section that a field holds, alone, in a list, or where null may stand in its place."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    inside = [*field.get("anyOf", ()), *([field["items"]] if "items" in field else [])]
    return next((found for found in map(_referred, inside) if found), None)


def _type(field: dict[str, Any]) -> str:
    """A field's type and bounds in words."""
    if "anyOf" in field:
        return " or ".join(_type(each) for each in field["anyOf"])
    if "$ref" in field:
        return "section"
    if "enum" in field:
        return "one of " + ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field["type"]
    if kind == "null":
        return "null"
    if kind == "array":
        least = field.get("minItems")
        return f"list ({_type(field['items'])})" + (f", at least {least}" if least else "")
    if kind == "object":
        values = field.get("additionalProperties", {})
        return f"mapping to {_type(values)}"
    bounds = [f"{word} {field[key]:g}" for key, word in BOUNDS.items() if key in field]
    if field.get("minLength"):
        bounds.append("not empty")
    return ", ".join([TYPES[kind], *bounds])


def _default(field: dict[str, Any]) -> str:
    """A field's default as YAML would have it."""
    value = field.get("default", {})
    if isinstance(value, dict):
        return "its own defaults" if _referred(field) else "`{}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "`true`", False: "`false`"}[value]
    return f"`{value}`"


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
