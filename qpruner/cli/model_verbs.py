"""The verbs that load models: `generate` and `export`.

Control characters in answers are replaced before they reach the terminal.
"""

import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import click

from qpruner.cli import Facts
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
) -> Facts:
    """Print the answer of every model of a run or folder to every prompt.

    `sampling` has the fields of `Sampling`.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError(
            "`--prompt TEXT` is missing or empty: give at least one, each with some text"
        )
    root = Path(place).expanduser()
    names: list[str] = []
    if which is not None:
        names = list(dict.fromkeys(name.strip() for name in which.split(",")))
    if (root / STATE).is_file():
        _warn_of_driver(RunDir(root, create=False))
    models = sources(place, names)
    answers = []
    for source in models:
        answers += _answers(source, prompts, Sampling(**sampling))
    if not as_json:
        _print_answers(prompts, answers, has_headings=len(models) > 1)
    described = [
        {"name": source.name, "folder": str(source.folder), "bytes": source.weight_bytes}
        for source in models
    ]
    return {"status": "ok", "models": described, "prompts": list(prompts), "answers": answers}


def _warn_of_driver(run: RunDir) -> None:
    """Warn that a command which still works on the run may replace its models."""
    warning = warning_of_driver(run)
    if warning:
        click.echo(warning, err=True)


def _print_answers(prompts: Sequence[str], answers: Sequence[Facts], has_headings: bool) -> None:
    for number, prompt in enumerate(prompts):
        if len(prompts) > 1:
            click.echo(f"> {printable(prompt)}")
        for answer in answers:
            if answer["prompt"] == number:
                heading = f"[{answer['model']}]\n" if has_headings else ""
                click.echo(f"{heading}{printable(answer['text'])}")


def _answers(source: Source, prompts: Sequence[str], sampling: Sampling) -> list[Facts]:
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


def export(run: str, form: str, merge: bool, out: str | None, as_json: bool) -> Facts:
    """Write the final model for another program, and print where it is and what differs."""
    if merge and form not in MERGEABLE:
        remedy = "for a merged model use `--to merged`"
        if form == "merged":
            remedy = "this form is merged already"
        raise UserError(
            f"`--merge` goes with `--to gguf` and `--to vllm`, not with `--to {form}`: {remedy}"
        )
    if out and "://" in out:
        raise UserError(
            f"`--out` must be a folder on this machine, got {out}: "
            "write there, and copy it afterwards"
        )
    run_dir = RunDir(run, create=False)
    whole_form = cast(forms.Form, f"{form}_merged" if merge else form)
    if out:
        target = Path(out).expanduser()
    else:
        root = run_dir.require_folder("name a folder with `--out`")
        target = root / "export" / whole_form
    _warn_of_driver(run_dir)
    with _interrupted_by_sigterm(), Terminal(quiet=False) as terminal:
        on_progress = loading_progress(terminal.emit, "export")
        exported = forms.export(run_dir, whole_form, target.resolve(), on_progress)
    click.echo("\n".join(_described(exported)))
    return {"status": "ok", **vars(exported), "folder": str(exported.folder)}


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, which deletes what is half written."""
    is_terminated = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_terminated
        is_terminated = True
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except Exception as error:  # torch makes a ValueError of an interrupt in its C code
        raise KeyboardInterrupt if is_terminated else error  # noqa: B904
    finally:
        signal.signal(signal.SIGTERM, before)


def _described(exported: forms.Exported) -> Iterator[str]:
    """Say what an export is, how it was checked and what it lost."""
    loads = "without qpruner" if exported.is_plain else "after `import qpruner.hf`"
    yield (
        f"{exported.folder}: diverges by {exported.divergence:.2g} nats a token from these weights "
        f"in transformers, same prediction at {exported.agreement:.1%} "
        f"of {exported.num_positions} positions, as {exported.by} computes it; loads {loads}"
    )
    for remark in exported.remarks:
        yield f"  {remark}"
    others = exported.file_bytes - exported.tensor_bytes
    yield (
        f"  {exported.file_bytes / 1e6:.1f} MB, of which {others / 1e6:.2f} MB are tokenizer and "
        f"metadata; the plan's tensors have {exported.plan_bytes / 1e6:.1f} MB"
    )
    yield (
        f"  loss on those positions: {exported.loss_before:.4f} before the export, "
        f"{exported.loss:.4f} as served"
    )
