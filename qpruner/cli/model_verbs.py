"""What `qpruner generate` and `qpruner chat` print: in columns on a terminal that is wide enough, else one under the
other; what a model says is shown without control characters, so that it cannot take the terminal over."""

from __future__ import annotations

import contextlib
import difflib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qpruner.cli.terminal import Terminal, can_redraw
from qpruner.errors import OutOfMemory, UserError
from qpruner.export.generate import WHICH, Answer, Sampling, Shelf, Source, sources
from qpruner.pipeline.compress import telling
from qpruner.report.liveness import warning_of_driver
from qpruner.runs.run_dir import STATE, RunDir

COLUMN = 36
"""Characters that a column needs."""
REFRESHES_PER_SECOND = 8
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COMMANDS = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def generate(
    place: str, which: str | None, prompts: Sequence[str], file: Path | None, sampling: Sampling, as_json: bool
) -> dict[str, Any]:
    """What every model says to every prompt.

    Args:
        place: A run folder, or that of a model.
        which: Of a run's models, separated by commas.
        prompts: Each one a conversation of its own.
        file: More of them, one a line.
        sampling: How answers are drawn.
        as_json: Print nothing but what is returned.

    Raises:
        UserError: If there is no prompt, or no such model.
    """
    asked = [*prompts, *(_lines(file) if file else ())]
    if not asked:
        raise UserError("there is no prompt: give `--prompt TEXT`, or `--file FILE` with one a line")
    if not all(prompt.strip() for prompt in asked):
        raise UserError("`--prompt` is empty: give it some text")
    models = _sources(place, which)
    shelf = _shelf(models)
    answers: list[dict[str, Any]] = []
    for source in models:
        click.echo(f"{_told(source)} ...", err=True)
        _load(shelf, [source], "generate")  # loading it is not answering
        for number, prompt in enumerate(asked):
            started = time.perf_counter()
            said = shelf.take(source).answer([prompt], sampling, lambda _: None)
            seconds = time.perf_counter() - started
            answers.append({"prompt": number, "model": source.name, **vars(said), "seconds": seconds})
    if not as_json:
        console = Console()
        for number, prompt in enumerate(asked):
            if len(asked) > 1:
                console.out(f"> {printable(prompt)}", highlight=False)
            with view(console, [source.name for source in models]) as say:
                for answer in answers:
                    if answer["prompt"] == number:
                        say(answer["model"], answer["text"])
    described = [{"name": each.name, "folder": str(each.folder), "bytes": each.weight_bytes} for each in models]
    return {"status": "ok", "models": described, "prompts": asked, "answers": answers}


def chat(place: str, which: str | None, sampling: Sampling) -> dict[str, Any]:
    """Talk to every model until the person has enough; each remembers what it said itself.

    Args:
        place: A run folder, or that of a model.
        which: Of a run's models, separated by commas.
        sampling: How answers are drawn.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` its arrow keys and history

    models = _sources(place, which)
    shelf, console = _shelf(models), Console()
    click.echo(f"{', '.join(map(_told, models))}; {COMMANDS}", err=True)
    if shelf.holds_all:
        _load(shelf, models, "chat")
    turns: dict[str, list[str]] = {source.name: [] for source in models}
    for line in _typed():
        if line == "/quit":
            break
        if line == "/reset":
            turns = {name: [] for name in turns}
        elif line.startswith("/"):
            click.echo(f"there is no {line.split()[0]}: {COMMANDS}", err=True)
        elif line.strip():
            try:
                said = _answers(console, shelf, models, {name: [*told, line] for name, told in turns.items()}, sampling)
            except KeyboardInterrupt:
                click.echo("\nstopped; nothing of this turn is remembered", err=True)
            except (UserError, OutOfMemory) as error:
                click.echo(f"error: {error}", err=True)
            else:
                turns = {name: [*told, line, said[name].text] for name, told in turns.items()}
    return {"status": "ok"}


def _answers(
    console: Console, shelf: Shelf, models: Sequence[Source], turns: Mapping[str, Sequence[str]], sampling: Sampling
) -> dict[str, Answer]:
    """What every model says to its conversation, shown as it comes."""
    said: dict[str, Answer] = {}
    with view(console, [source.name for source in models]) as say:
        for source in models:

            def on_text(piece: str, name: str = source.name) -> None:
                say(name, piece)

            said[source.name] = shelf.take(source).answer(turns[source.name], sampling, on_text)
    return said


@contextlib.contextmanager
def view(console: Console, names: Sequence[str]) -> Iterator[Callable[[str, str], None]]:
    """A place for what models say at a time; gives a function that takes a model's name and its next piece of text."""
    texts = dict.fromkeys(names, "")
    if 1 < len(names) <= console.width // COLUMN and can_redraw(console):

        def add(name: str, piece: str) -> None:
            texts[name] += printable(piece)

        with Live(get_renderable=lambda: _columns(texts), console=console, refresh_per_second=REFRESHES_PER_SECOND):
            yield add
        return

    def write(name: str, piece: str) -> None:
        if not texts[name] and len(names) > 1:
            console.out(f"\n[{name}]" if any(texts.values()) else f"[{name}]", highlight=False)
        texts[name] += piece
        console.out(printable(piece), highlight=False, end="")

    yield write
    console.out()


def _columns(texts: Mapping[str, str]) -> Table:
    table = Table(expand=True)
    for name in texts:
        table.add_column(name, ratio=1)
    table.add_row(*(Text(text) for text in texts.values()))
    return table


def printable(text: str) -> str:
    """A text with its control characters replaced, line feeds and tabs aside."""
    return CONTROL.sub("\ufffd", text)


def _typed() -> Iterator[str]:
    """What the person types, line by line, to Ctrl-D."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return


def _sources(place: str, which: str | None) -> list[Source]:
    """The models to talk to; of a run it is told which are missing, and that a command works on it."""
    root = Path(place).expanduser()
    is_run = (root / STATE).is_file()
    if is_run and (warning := warning_of_driver(RunDir(root, create=False))):
        click.echo(warning, err=True)
    found = sources(place, _names(which))
    missing = [name for name in WHICH if name not in {source.name for source in found}]
    if is_run and which is None and missing:
        click.echo(f"{', '.join(missing)}: not there yet; `qpruner run` makes them", err=True)
    return found


def _names(which: str | None) -> list[str]:
    """The models that `--which` names."""
    names = list(dict.fromkeys(name.strip() for name in which.split(","))) if which is not None else []
    for name in names:
        if name not in WHICH:
            nearest = difflib.get_close_matches(name, WHICH, n=1)
            hint = f"did you mean `{nearest[0]}`?" if nearest else f"there are {', '.join(WHICH)}"
            raise UserError(f"`--which`: a run has no {name!r}; {hint}")
    return names


def _lines(file: Path) -> list[str]:
    """The prompts of a file, one a line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`--file`: {file} cannot be read: {error}; name a text file in UTF-8") from error
    return [line for line in lines if line.strip()]


def _shelf(models: Sequence[Source]) -> Shelf:
    shelf = Shelf.of(models)
    if not shelf.holds_all:
        click.echo(
            "memory does not hold all of these models at once: each is loaded when it is its turn; name fewer with "
            "`--which`",
            err=True,
        )
    return shelf


def _load(shelf: Shelf, models: Sequence[Source], verb: str) -> None:
    """Bring models into memory, and show how far that is."""
    with Terminal(quiet=False, stderr=True) as terminal:
        for source in models:
            shelf.take(source, telling(terminal.emit, verb))


def _told(source: Source) -> str:
    return f"{source.name} ({source.weight_bytes / 1e6:.1f} MB)"
