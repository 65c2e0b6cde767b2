"""Write the pages that are made from the code, `configuration.md` and `commands.md`: `python
docs/reference.py`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from qpruner.cli.main import main
from qpruner.config.schema import RunConfig

FOLDER = Path(__file__).resolve().parent
MADE = "<!-- Made from the code by `python docs/reference.py`: change it there. -->"
TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": ""}
BOUNDS = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}


def pages() -> dict[str, str]:
    """Return each page by the name of its file."""
    return {"configuration.md": configuration(), "commands.md": commands()}


def commands() -> str:
    """Write the page of every verb: its arguments, its help and its options, those that several
    verbs share once."""
    verbs = [main.commands[name] for name in main.list_commands(click.Context(main))]
    by_line: dict[str, list[str]] = {}
    for verb in verbs:
        for line in _options(verb):
            by_line.setdefault(line, []).append(str(verb.name))
    shared = {line: names for line, names in by_line.items() if len(names) > 2}
    of_config = {
        str(verb.name)
        for verb in verbs
        if any(option.name == "overrides" for option in verb.params)
    }
    lines = [
        *("# Commands", "", MADE, ""),
        "After this page you know what each verb and option does; `qpruner VERB --help` says the "
        "same. Exit codes: 0 success, 1 a failure of qpruner or the machine, 2 a mistake in the "
        "input, 130 after Ctrl-C. With `--json` the last line of stdout is one JSON object.",
        *("", "## Options of several verbs", ""),
        *(f"{line} Of {_named(names, of_config)}." for line, names in shared.items()),
    ]
    for verb in verbs:
        _, *arguments = verb.collect_usage_pieces(click.Context(verb))
        usage = " ".join([f"Usage: qpruner {verb.name}", *arguments])
        own = [line for line in _options(verb) if line not in shared]
        lines += [
            "",
            f"## qpruner {verb.name}",
            "",
            f"{_text(verb.help)} `{usage}`",
            *([""] if own else []),
            *own,
        ]
    return "\n".join(lines).rstrip() + "\n"


def _named(names: list[str], of_config: set[str]) -> str:
    """Name verbs, those that take a CONFIG together."""
    if not of_config <= set(names):
        return ", ".join(names)
    return ", ".join(["every verb of a CONFIG", *(name for name in names if name not in of_config)])


def _options(verb: click.Command) -> Iterator[str]:
    """Yield a line for each option of a verb."""
    context = click.Context(verb, show_default=True)
    for option in verb.params:
        record = option.get_help_record(context)
        if isinstance(option, click.Option) and record:
            yield f"- `{record[0]}`: {_text(record[1])}"


def _text(text: str | None) -> str:
    """Return a text as one line, with its sentence ended."""
    line = " ".join((text or "").split())
    return line if line.endswith((".", "]")) else f"{line}."


def configuration() -> str:
    """Write the page of every key: its type, rule, default and meaning, as the configuration's JSON
    schema has them."""
    schema = RunConfig.model_json_schema()
    lines = [
        *("# Configuration", "", MADE, ""),
        "After this page you can set every key of a configuration: its type, rule and default. An "
        "unknown key is an error. So is a value that cannot work; `qpruner check` names it. On the "
        "command line `--set SECTION.KEY=VALUE` overrides a key, `--set data.train.0.limit=8` one "
        "in an item of a list, counted from 0. `--set SECTION.KEY=` takes a key out, so that its "
        "default holds. Editors complete the file with `tune_configs/schema.json`.",
        "",
        *_section("", schema, schema["$defs"], {}),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _section(
    path: str, schema: dict[str, Any], defined: dict[str, Any], shown: dict[str, str]
) -> Iterator[str]:
    """Yield a section's keys, then the sections inside it that are not `shown` yet, each under the
    first path to it."""
    yield from (f"## {path.rstrip('.') or 'The file'}", "", _text(schema.get("description")), "")
    required, inner = schema.get("required", ()), []
    for name, field in schema["properties"].items():
        default = "required" if name in required else _default(field)
        rule = ", ".join(part for part in (_type(field), default) if part)
        about, target = " ".join(field.get("description", "").split()), _referred(field)
        if target and target not in shown:
            shown[target] = f"{path}{name}"
            inner.append(target)
        keys = f"[keys](#{shown[target].replace('.', '')})" if target else ""
        if target and not about:
            continue  # a section of its own, which follows
        yield (
            f"- `{path}{name}` ({', '.join(filter(None, (rule, keys)))})"
            f"{': ' if about else ''}{about}"
        )
    yield ""
    for target in inner:
        yield from _section(f"{shown[target]}.", defined[target], defined, shown)


def _referred(field: dict[str, Any]) -> str | None:
    """Return the name of the section that a field holds, alone, in a list, or where null may stand
    in its place."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    inside = [*field.get("anyOf", ()), *([field["items"]] if "items" in field else [])]
    return next((found for found in map(_referred, inside) if found), None)


def _type(field: dict[str, Any]) -> str:
    """Say a field's type and bounds; null is told by the default."""
    if "anyOf" in field:
        return " or ".join(_type(each) for each in field["anyOf"] if each.get("type") != "null")
    if "$ref" in field:
        return ""
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field["type"]
    if kind == "array":
        return f"list of {_type(field['items']) or 'sections'}" + (
            ", not empty" if field.get("minItems") else ""
        )
    if kind == "object":
        return f"mapping to {_type(field.get('additionalProperties', {}))}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
    return " ".join(filter(None, (TYPES[kind], *bounds)))


def _default(field: dict[str, Any]) -> str:
    """Say a field's default as YAML would have it."""
    value = field.get("default", {})
    if isinstance(value, dict):
        return "" if _referred(field) else "default `{}`"
    if isinstance(value, list):
        return f"default `[{', '.join(map(str, value))}]`"
    if value is None or isinstance(value, bool):
        return f"default `{str(value).lower().replace('none', 'null')}`"
    return f"default `{value}`"


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
