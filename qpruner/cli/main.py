"""The command line: verbs and their options.

Exit codes: 0 on success, 2 on a user's mistake, 1 on ours. With `--json` the last line of stdout is one JSON object.
Heavy imports stay inside the verbs, so that `qpruner --help` answers at once.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpruner.cli import run_verbs
from qpruner.config.load import config_schema, load_config
from qpruner.errors import CorruptFile, QprunerError, UserError, note_defect
from qpruner.pipeline.flow import STAGES, stages_until
from qpruner.pipeline.prune import Prune
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
"""Verbs that run the flow: the last stage, and the help."""
LOCAL_RAY = "Ray cluster to join (auto or HOST:PORT); starts a local one without it."
ABOUT_VERSION = "Show the version and its commit, and exit."
NO_RAY = "Ray cluster to join (auto or HOST:PORT); starts none without it."
ABOUT_DAMAGE = (
    "fetch it again if it is yours; if a run wrote it, repeat `qpruner run`, which makes it anew; if that names the "
    "same file again, delete it and repeat `qpruner run`"
)
"""What to do about a file that verbs without stages cannot read; a stage knows more and says so itself."""


def _show_version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        click.echo(f"qpruner, version {describe()}")
        ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help=ABOUT_VERSION)
def main() -> None:
    """Make a large language model fit the memory you have, at the least loss."""
    # torch's threads wait for one another spinning. Beside another busy process that doubled a training step on two
    # cores (2026-11-26: 16 s, else 7); they sleep after so many turns. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _guarded(as_json: bool, work: Callable[[], dict[str, Any]], plan_file: Path | None = None) -> None:
    """Run a verb; errors of ours end in a message and their exit code, not in a traceback."""
    try:
        outcome, code = work(), 0
    except QprunerError as error:
        code, text = error.exit_code, str(error)
        if plan_file:
            text = text.replace("`search.plan`", "`--plan`")  # the name under which it was given
        remedy = f"\n  remedy: {ABOUT_DAMAGE}" if isinstance(error, CorruptFile) else ""
        click.echo(f"error: {text}{remedy}", err=True)
        outcome = {"status": "error", "kind": type(error).__name__, "error": text}
    except BrokenPipeError:
        raise  # click ends quietly where nobody reads on, as in `qpruner trials RUN | head`
    except Exception as error:
        outcome, code = {"status": "error", "kind": type(error).__name__, "error": f"{error}\n{note_defect(error)}"}, 1
        traceback.print_exc()
    except KeyboardInterrupt:
        outcome, code = {"status": "interrupted", "resume": as_called()}, 130
        click.echo(f"interrupted; go on with: {outcome['resume']}", err=True)
    if as_json:
        click.echo(json.dumps(without_nan(outcome), allow_nan=False))
    if code:
        sys.exit(code)


def _verb(*options: Any, **about: Any) -> Callable[[Callable[..., dict[str, Any]]], None]:
    """Register a verb: a function of its options that returns the object for `--json`."""

    def register(function: Callable[..., dict[str, Any]]) -> None:
        @functools.wraps(function)
        def verb(**given: Any) -> None:
            _guarded(given["as_json"], functools.partial(function, **given), given.get("plan_file"))

        for option in reversed(options):
            verb = option(verb)
        main.command(**about)(verb)

    return register


def _config_options(about_address: str, metavar: str = "CONFIG") -> tuple[Any, ...]:
    about_set = "Override a key: search.max_trials=20, data.train.0.limit=8; `KEY=` takes it out of the file."
    return (
        click.option("--quiet", is_flag=True, help="Print the result only."),
        click.option("--json", "as_json", is_flag=True, help="End stdout with one JSON object."),
        click.option("--address", help=about_address),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=about_set),
        click.argument("config", metavar=metavar, type=click.Path()),
    )


def _plan_option(does: str) -> Any:
    about = f"{does}: bits by group, as `qpruner plan` prints them, or a sensitivity for its seed plan."
    return click.option("--plan", "plan_file", type=click.Path(path_type=Path), metavar="FILE", help=about)


def _load(config: str, overrides: tuple[str, ...], plan_file: Path | None) -> RunConfig:
    given = [] if plan_file is None else [f"search.plan={json.dumps(str(plan_file))}"]
    loaded = load_config(Path(config), [*overrides, *given])
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
        dry_run: bool = False,
    ) -> dict[str, Any]:
        if name == Report.name and not (Path(config).is_file() or Path(config).suffix in (".yaml", ".yml")):
            if overrides or plan_file or address:
                raise UserError(
                    f"`--set`, `--plan` and `--address` belong to a configuration, and {config} is a run: leave them "
                    "out, or name the configuration instead"
                )
            return run_verbs.report(config)
        loaded = _load(config, overrides, plan_file)
        from qpruner.cli import flow_verbs

        if dry_run:
            return flow_verbs.preview(loaded, address, quiet)
        return flow_verbs.run(loaded, address, last.name, quiet)

    metavar = "RUN_OR_CONFIG" if name == Report.name else "CONFIG"
    options = [*_config_options(LOCAL_RAY if last.starts_ray else NO_RAY, metavar)]
    if last is Prune:
        options.append(click.option("--dry-run", is_flag=True, help="Show what would be kept; write nothing."))
    if Search in stages_until(last.name):
        options.append(_plan_option("Take this plan instead of searching for one"))
    _verb(*options, name=name, help=text)(verb)


for _name, (_last, _text) in VERBS.items():
    _add_flow_verb(_name, _last, _text)


@_verb(
    *_config_options(
        "Ray cluster to look at (auto or HOST:PORT); looks at this machine without it, and starts no Ray."
    ),
    click.option("--measure", is_flag=True, help="Time a few steps of these shapes here, and estimate hours by them."),
    click.option("--gpu", "for_gpus", is_flag=True, help="Assume a machine with GPUs, whatever is here."),
    click.option("--show-config", is_flag=True, help="Print every key of the configuration in effect, defaults too."),
    _plan_option("Check this plan, too"),
)
def check(
    config: str, overrides: tuple[str, ...], plan_file: Path | None, as_json: bool, quiet: bool, **options: Any
) -> dict[str, Any]:
    """Validate a configuration and say what the run would be and take; loads no weights."""
    loaded = _load(config, overrides, plan_file)
    if not (quiet or as_json):
        # Before the imports, which take seconds by themselves.
        steps = ", then a few steps" if options["measure"] else ""
        click.echo(f"[check] model, rows, tasks and machine of {config}{steps} ...", err=True)
    from qpruner.cli.check import check

    return check(loaded, quiet=quiet, **options)


_run_folder = click.argument("run", type=click.Path())
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
_json_last = click.option("--json", "as_json", is_flag=True, help="End stdout with one JSON object.")


_verb(_run_folder, _json)(run_verbs.status)
_verb(
    _run_folder,
    click.option(
        "--where",
        "conditions",
        multiple=True,
        metavar="KEY=VALUE",
        help="Only these: status=finished, loss<3.2, 'bytes<=126 MB'; also != and >. Several all hold.",
    ),
    click.option("--sort", default="trial", metavar="KEY", show_default=True, help="A column, or `score`."),
    click.option("--descending", is_flag=True, help="Largest first."),
    click.option("--csv", "as_csv", is_flag=True, help="Every column, the bits of each group too, as CSV."),
    _json,
)(run_verbs.trials)
_verb(
    _run_folder,
    click.option("--trial", "index", type=int, metavar="NUMBER", help="The plan of this trial instead."),
    _json,
)(run_verbs.plan)
_verb(click.argument("runs", nargs=-1, required=True, type=click.Path()), _json)(run_verbs.compare)


@main.command()
@click.option("--results", is_flag=True, help="That of results.json instead.")
def schema(results: bool) -> None:
    """Print the JSON schema of the configuration, for editors."""
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
        type=click.Choice(("merged", "peft")),
        required=True,
        help="merged: dense, the adapter added in. peft: the adapter, and the quantized model below it.",
    ),
    click.option("--out", type=click.Path(path_type=Path), help="Where to; RUN/export/FORM without it."),
    _json_last,
)
def export(**options: Any) -> dict[str, Any]:
    """Write the final model in another form, and compare its predictions before it counts."""
    quiet_libraries()
    from qpruner.cli import model_verbs

    return model_verbs.export(**options)


_verb(
    _run_folder,
    click.argument("repo_id", metavar="OWNER/NAME"),
    click.option("--public/--private", "is_public", default=False, help="Who may see it; private without either."),
    click.option(
        "--what",
        type=click.Choice(("final", "merged", "peft")),
        default="final",
        show_default=True,
        help="final: packed layers and adapter. merged, peft: what `export --to` wrote.",
    ),
    _json_last,
)(run_verbs.push)


@_verb(
    click.argument("place", metavar="RUN_OR_FOLDER", type=click.Path()),
    click.option(
        "--prompt", "prompts", multiple=True, metavar="TEXT", help="What to answer; may be given several times."
    ),
    click.option("--file", type=click.Path(path_type=Path), help="More prompts, one a line."),
    click.option(
        "--which", metavar="NAMES", help="Of a run's models: base,pruned,final. All that are there without it."
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        default=128,
        show_default=True,
        help="Tokens an answer may have.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="0: the likeliest token every time.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of draws above 0."),
    click.option(
        "--template",
        type=click.Choice(["chat", "alpaca", "none"]),
        default="chat",
        show_default=True,
        help="What is put around a prompt: the tokenizer's chat template (none where it has none), or that of "
        "`data.template: alpaca`, as in a fine-tune on instructions.",
    ),
    _json,
)
def generate(**options: Any) -> dict[str, Any]:
    """Print what a run's base, pruned and final model, or the model of a folder, answer to a prompt."""
    quiet_libraries()
    from qpruner.cli import model_verbs

    return model_verbs.generate(**options)
