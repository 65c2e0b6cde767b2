"""The command line: verbs and their options.

The exit code is 2 for a mistake in the input and 1 for any other failure. With `--json` the last
line of stdout is one JSON object. Heavy imports stay inside the verbs.
"""

from __future__ import annotations

import codecs
import functools
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpruner.cli import Facts, run_verbs
from qpruner.config.load import config_schema, load_config
from qpruner.errors import CorruptFile, QprunerError, note_defect
from qpruner.pipeline.flow import STAGES, stages_until
from qpruner.pipeline.report import Report
from qpruner.pipeline.search import Search
from qpruner.pipeline.stage import Stage
from qpruner.runs.logs import quiet_libraries
from qpruner.runs.version import describe
from qpruner.wording import as_called, without_nan

if TYPE_CHECKING:
    from qpruner.config.schema import RunConfig

VERBS: dict[str, tuple[type[Stage[Any]], str]] = {
    "run": (Report, "Run the whole flow: prune, search, fine-tune, evaluate, report."),
    **{stage.name: (stage, stage.help) for stage in STAGES if stage.help},
}
"""Verbs that run stages: the last stage of each verb, and its help text."""
PLAIN = "qpruner_plain"
"""Name of the handler of characters that the encoding of a terminal lacks."""
LOCAL_RAY = "Ray cluster to join (auto or HOST:PORT); if not given, Ray starts on this machine."
ABOUT_VERSION = "Show the version and its commit, and exit."
NO_RAY = "Ray cluster to join (auto or HOST:PORT); if not given, Ray is not started."
ABOUT_TEMPLATE = (
    "Around each prompt: the tokenizer's chat template (or none if it lacks one), Alpaca's, or "
    "none."
)
TEMPLATES = ["chat", "alpaca", "alpaca_short", "none"]
ABOUT_TO = (
    "gguf: for llama.cpp, Ollama; vllm; merged: a dense model; peft: adapter and quantized model."
)
ABOUT_DAMAGE = "repeat `qpruner run` to write it again, or fetch it again if the file is yours"
"""Remedy for a damaged file in a verb that runs no stages; the error of a stage has a more exact
remedy."""


def _show_version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        click.echo(f"qpruner, version {describe()}")
        ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help=ABOUT_VERSION,
)
def main() -> None:
    """Make a large language model fit into your memory with the least loss of quality."""
    # Beside a busy process torch's spinning threads doubled a step's time. Read when torch loads:
    # they sleep soon.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    codecs.register_error(PLAIN, _in_plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAIN)


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that a terminal's encoding lacks: `±` by `+-`, any other by `?`."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    plain = ["+-" if character == "±" else "?" for character in lacking]
    return "".join(plain), error.end


def _guarded(as_json: bool, work: Callable[[], Facts], plan_file: Path | None = None) -> None:
    """Run a verb, and turn its errors into messages and exit codes.

    If `plan_file` is given, messages name the option `--plan` and not the key `search.plan`.
    """
    code = 0
    try:
        outcome = work()
    except BrokenPipeError:
        # click exits quietly if the reader closes the pipe, as in `qpruner trials RUN | head`
        raise
    except Exception as error:
        if isinstance(error, QprunerError):
            code = error.exit_code
            text = str(error)
            if plan_file:
                text = text.replace("`search.plan`", "`--plan`")  # the option that was given
            remedy = f"\n  remedy: {ABOUT_DAMAGE}" if isinstance(error, CorruptFile) else ""
            click.echo(f"error: {text}{remedy}", err=True)
        else:
            code = 1
            text = f"{error}\n{note_defect(error)}"
            traceback.print_exc()
        outcome = {"status": "error", "kind": type(error).__name__, "error": text}
    except KeyboardInterrupt:
        code = 130
        outcome = {"status": "interrupted", "resume": as_called()}
        click.echo(f"interrupted; continue with: {outcome['resume']}", err=True)
    if as_json:
        click.echo(json.dumps(without_nan(outcome), allow_nan=False))
    if code:
        sys.exit(code)


def _verb(*options: Any, **about: Any) -> Callable[[Callable[..., Facts]], None]:
    """Register a function as a verb with these options.

    The function returns the object that `--json` prints.
    """

    def register(function: Callable[..., Facts]) -> None:
        @functools.wraps(function)
        def verb(**given: Any) -> None:
            _guarded(given["as_json"], functools.partial(function, **given), given.get("plan_file"))

        for option in reversed(options):
            verb = option(verb)
        main.command(**about)(verb)

    return register


_json_last = click.option(
    "--json", "as_json", is_flag=True, help="End stdout with one JSON object."
)


def _config_options(about_address: str) -> tuple[Any, ...]:
    about_set = (
        "Override a key: search.max_trials=20, data.train.0.limit=8; `KEY=` restores the default."
    )
    return (
        click.option("--quiet", is_flag=True, help="Print the result only."),
        _json_last,
        click.option("--address", help=about_address),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=about_set),
        click.argument("config", type=click.Path()),
    )


def _plan_option(does: str) -> Any:
    about = (
        f"{does}: a file as `qpruner plan` prints it, or the name of a sensitivity for its seed "
        "plan."
    )
    return click.option(
        "--plan", "plan_file", type=click.Path(path_type=Path), metavar="FILE", help=about
    )


def _load(config: str, overrides: tuple[str, ...], plan_file: Path | None) -> RunConfig:
    settings = list(overrides)
    if plan_file is not None:
        settings.append(f"search.plan={json.dumps(str(plan_file))}")
    loaded = load_config(Path(config), settings)
    quiet_libraries()
    return loaded


def _add_flow_verb(name: str, last: type[Stage[Any]], text: str) -> None:
    def verb(
        config: str,
        overrides: tuple[str, ...],
        address: str | None,
        as_json: bool,
        quiet: bool,
        plan_file: Path | None = None,
    ) -> Facts:
        loaded = _load(config, overrides, plan_file)
        from qpruner.cli import flow_verbs

        return flow_verbs.run(loaded, address, last.name, quiet)

    options = list(_config_options(LOCAL_RAY if last.starts_ray else NO_RAY))
    if Search in stages_until(last.name):
        options.append(_plan_option("Use this plan instead of searching for one"))
    register = _verb(*options, name=name, help=text)
    register(verb)


for _name, (_last, _text) in VERBS.items():
    _add_flow_verb(_name, _last, _text)


@_verb(
    *_config_options(
        "Ray cluster to check (auto or HOST:PORT); if not given, this machine is checked."
    ),
    click.option(
        "--measure",
        is_flag=True,
        help="Time a few steps on this machine and estimate the hours from them.",
    ),
    click.option(
        "--gpu",
        "for_gpus",
        is_flag=True,
        help="Assume a machine with GPUs, even if this one has none.",
    ),
    click.option(
        "--show-config",
        is_flag=True,
        help="Print every key of the configuration, defaults included.",
    ),
    _plan_option("Check this plan too"),
)
def check(
    config: str,
    overrides: tuple[str, ...],
    plan_file: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> Facts:
    """Validate a configuration and estimate what its run would need; loads no weights."""
    loaded = _load(config, overrides, plan_file)
    if not (quiet or as_json):
        # Printed before the imports, which alone take seconds.
        steps = ", then a few steps" if options["measure"] else ""
        click.echo(f"[check] model, rows, tasks and machine of {config}{steps} ...", err=True)
    from qpruner.cli.check import check

    return check(loaded, quiet=quiet, **options)


_run_folder = click.argument("run", type=click.Path())
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")

_verb(_run_folder, _json)(run_verbs.status)
_verb(
    _run_folder,
    click.option("--sort", default="trial", metavar="KEY", help="Column to sort by."),
    _json,
)(run_verbs.trials)
_verb(
    _run_folder,
    click.option(
        "--trial",
        "index",
        type=int,
        metavar="NUMBER",
        help="Print this trial's plan, not the winner's.",
    ),
    _json,
)(run_verbs.plan)
_verb(_run_folder, _json_last)(run_verbs.report)
_verb(click.argument("runs", nargs=-1, required=True, type=click.Path()), _json)(run_verbs.compare)


@main.command()
@click.option("--results", is_flag=True, help="Print the schema of results.json instead.")
def schema(results: bool) -> None:
    """Print the JSON schema of configurations, or of results.json."""
    if results:
        from qpruner.report.files import summary_schema

        click.echo(summary_schema(), nl=False)
    else:
        click.echo(config_schema(), nl=False)


@_verb(
    _run_folder,
    click.option(
        "--to",
        "form",
        type=click.Choice(("gguf", "vllm", "merged", "peft")),
        required=True,
        help=ABOUT_TO,
    ),
    click.option(
        "--merge",
        is_flag=True,
        help="With gguf and vllm: merge the adapter into the packed weights.",
    ),
    click.option("--out", type=click.Path(), help="Folder to write; by default RUN/export/FORM."),
    _json_last,
)
def export(**options: Any) -> Facts:
    """Export the final model for llama.cpp, vLLM, transformers or peft.

    Files are kept only if they predict what the final model predicts.
    """
    quiet_libraries()
    from qpruner.cli import model_verbs

    return model_verbs.export(**options)


_verb(
    _run_folder,
    click.argument("repo_id", metavar="OWNER/NAME"),
    click.option("--public/--private", "is_public", default=False, help="Visibility."),
    click.option(
        "--what",
        type=click.Choice(("final", "merged", "peft")),
        default="final",
        help="Form to upload.",
    ),
    _json_last,
)(run_verbs.push)


@_verb(
    click.argument("place", metavar="RUN_OR_FOLDER", type=click.Path()),
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="TEXT",
        help="Prompt to answer; may be repeated.",
    ),
    click.option(
        "--which", metavar="NAMES", help="Models of a run, such as base,cut-20,final; default: all."
    ),
    click.option(
        "--max-tokens", type=click.IntRange(min=1), default=128, help="Maximum tokens of an answer."
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=0.0,
        help="0 always takes the likeliest token.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the sampling."),
    click.option("--template", type=click.Choice(TEMPLATES), default="chat", help=ABOUT_TEMPLATE),
    _json,
)
def generate(**options: Any) -> Facts:
    """Print answers to a prompt from the models of a run or of a folder.

    The models of a run are its base, its pruned models and the final one.
    """
    quiet_libraries()
    from qpruner.cli import model_verbs

    return model_verbs.generate(**options)
