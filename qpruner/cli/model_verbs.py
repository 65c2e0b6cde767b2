"""The verbs that load models: `generate` and `export`.

Control characters in answers are replaced before they reach the terminal.
"""

import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import click

from qpruner.cli.terminal import Terminal
from qpruner.errors import UserError
from qpruner.export import forms
from qpruner.export.generate import Sampling, Source, sources
from qpruner.models.memory import release
from qpruner.pipeline.prepare import loading_progress
from qpruner.report.snapshot import warning_of_driver
from qpruner.runs.run_dir import STATE, RunDir

MERGEABLE = ("gguf", "vllm")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def generate(
    place: str, which: str | None, prompts: Sequence[str], as_json: bool, **sampling: Any
) -> dict[str, Any]:
    """Print the answer of every model of a run or folder to every prompt.

    `sampling` has the fields of `Sampling`.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError(
            "`--prompt TEXT` is missing or empty: give at least one, each with some text"
        )
    root = Path(place).expanduser()
    names = (
        list(dict.fromkeys(name.strip() for name in which.split(","))) if which is not None else []
    )
    # A command that still works on the run may replace the models.
    if (root / STATE).is_file() and (warning := warning_of_driver(RunDir(root, create=False))):
        click.echo(warning, err=True)
    models = sources(place, names)
    answers = [
        answer for source in models for answer in _answers(source, prompts, Sampling(**sampling))
    ]
    if not as_json:
        for number, prompt in enumerate(prompts):
            if len(prompts) > 1:
                click.echo(f"> {printable(prompt)}")
            for answer in answers:
                if answer["prompt"] == number:
                    heading = f"[{answer['model']}]\n" if len(models) > 1 else ""
                    click.echo(f"{heading}{printable(answer['text'])}")
    described = [
        {"name": each.name, "folder": str(each.folder), "bytes": each.weight_bytes}
        for each in models
    ]
    return {"status": "ok", "models": described, "prompts": list(prompts), "answers": answers}


def _answers(source: Source, prompts: Sequence[str], sampling: Sampling) -> list[dict[str, Any]]:
    click.echo(f"{source.name} ({source.weight_bytes / 1e6:.1f} MB) ...", err=True)
    with Terminal(quiet=False, stderr=True) as terminal:
        generator = source.load(loading_progress(terminal.emit, "generate"))
    answers = []
    for number, prompt in enumerate(prompts):
        started = time.perf_counter()
        answer = generator.answer(prompt, sampling)
        seconds = time.perf_counter() - started
        answers.append({"prompt": number, "model": source.name, **vars(answer), "seconds": seconds})
    del generator
    release()
    return answers


def printable(text: str) -> str:
    """Replace the control characters of a text, except line feeds and tabs."""
    return CONTROL.sub("\ufffd", text)


def export(run: str, form: str, merge: bool, out: str | None, as_json: bool) -> dict[str, Any]:
    """Write the final model for another program, and print where it is and what differs."""
    if merge and form not in MERGEABLE:
        how = (
            "this form is merged already"
            if form == "merged"
            else "for a merged model use `--to merged`"
        )
        raise UserError(
            f"`--merge` goes with `--to gguf` and `--to vllm`, not with `--to {form}`: {how}"
        )
    if out and "://" in out:
        raise UserError(
            f"`--out` must be a folder on this machine, got {out}: write there, and copy it "
            "afterwards"
        )
    folder, wanted = (
        RunDir(run, create=False),
        cast(forms.Form, f"{form}_merged" if merge else form),
    )
    place = (
        Path(out).expanduser()
        if out
        else folder.require_folder("name a folder with `--out`") / "export" / wanted
    )
    if warning := warning_of_driver(folder):
        click.echo(warning, err=True)
    with _interrupted_by_sigterm(), Terminal(quiet=False) as terminal:
        done = forms.export(
            folder, wanted, place.resolve(), loading_progress(terminal.emit, "export")
        )
    click.echo("\n".join(_described(done)))
    return {"status": "ok", **vars(done), "folder": str(done.folder)}


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, which deletes what is half written."""
    told = dict[int, Any]()
    before = signal.signal(
        signal.SIGTERM, lambda *now: (told.setdefault(*now), signal.default_int_handler(*now))
    )
    try:
        yield
    except Exception as error:  # torch makes a ValueError of an interrupt in its C code
        raise KeyboardInterrupt if told else error  # noqa: B904
    finally:
        signal.signal(signal.SIGTERM, before)


def _described(done: forms.Exported) -> Iterator[str]:
    """Say what an export is, how it was checked and what it lost."""
    yield (
        f"{done.folder}: diverges by {done.divergence:.2g} nats a token from these weights in "
        "transformers, same "
        f"prediction at {done.agreement:.1%} of {done.num_positions} positions, as {done.by} "
        "computes it; loads "
        + ("without qpruner" if done.is_plain else "after `import qpruner.hf`")
    )
    for each in done.remarks:
        yield f"  {each}"
    more = done.file_bytes - done.tensor_bytes
    yield (
        f"  {done.file_bytes / 1e6:.1f} MB, of which {more / 1e6:.2f} MB are tokenizer and "
        "metadata; "
        f"the plan's tensors have {done.plan_bytes / 1e6:.1f} MB"
    )
    yield (
        f"  loss on those positions: {done.loss_before:.4f} before the export, {done.loss:.4f} as "
        "served"
    )
