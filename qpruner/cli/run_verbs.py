"""The verbs that read a run folder and load no model.

Every docstring is the help of its verb. The figures come from `report.run_views`.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
import yaml

from qpruner.cli.terminal import Terminal
from qpruner.errors import UserError
from qpruner.plans.plan import budget_text, cut_title, plan_of
from qpruner.report import run_views
from qpruner.report.snapshot import GONE, RUNNING, Snapshot, read_snapshot
from qpruner.runs.logs import quiet_libraries
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import display_name
from qpruner.search.progress import score_title, score_with_step, search_lines, search_progress
from qpruner.search.trial_records import REMEDIES
from qpruner.wording import counted, duration, nearest

SHOWN = (
    *("trial", "winner", "from", "cut", "status", "failure", "bytes", "mean_bits", "step"),
    *("loss", "accuracy", "seconds", "search", "plan"),
)
# maximum number of running trials, and of failed trials, that `status` lists; `trials` lists all
MOST_LINES = 10


def status(run: str, as_json: bool) -> dict[str, Any]:
    """Show the state of a run: its stages, its trials and the best trial so far.

    It can be called in any shell, and on any machine that sees the run folder.
    """
    snapshot = read_snapshot(RunDir(run, create=False))
    facts = run_views.status(snapshot, time.time())
    if not as_json:
        terminal = Terminal(quiet=False)
        terminal.say(_headline(facts))
        rows = [
            (
                each["stage"],
                each["state"],
                _figure("seconds", each["seconds"]),
                each["steps"] or "",
                each["text"],
            )
            for each in facts["stages"]
        ]
        terminal.table(("stage", "state", "time", "steps", ""), rows)
        for name, why in facts["left_out"].items():
            terminal.say(f"left out      {cut_title(name)}: {why}")
        for line in (*_search_lines(snapshot, facts), *filter(None, [facts["to_compare"]])):
            terminal.say(line)
    return {"status": "ok", **facts}


def _headline(facts: dict[str, Any]) -> str:
    text, quiet = (
        f"{facts['run']}: {facts['outcome']}",
        duration(facts["seconds_since_sign_of_life"]),
    )
    process = f"on {facts['host']} (process {facts['pid']})"
    if facts["outcome"] == "done":
        return text
    if facts["outcome"] == "failed":
        return f"{text}: {facts['error']}"
    if facts["outcome"] == RUNNING:
        return f"{text} {process}, last sign of life {quiet} ago"
    if facts["outcome"] == GONE:
        text = f"{facts['run']}: no sign of life for {quiet} {process}: {GONE}"
    return f"{text}; repeat the command to go on, in {facts['folder']}: {facts['command']}"


def _search_lines(run: Snapshot, facts: dict[str, Any]) -> list[str]:
    state, search = run.state.search, facts["search"]
    if state is None:
        return []
    is_running = facts["outcome"] == RUNNING
    lines = [
        f"{line} [{plan_of(best)}]" if best else line
        for line, best in search_lines(state, search_progress(state, run.trials), is_running)
    ]
    for each in search["under_way"][:MOST_LINES]:
        word = "under way" if is_running else "begun"
        about = f"trial {each['trial']} ({each['from']}), {cut_title(each['cut'])}"
        lines.append(f"{word:<12}  {about}, step {each['step']}/{state.steps}")
    lines += map(_failed, search["failures"][:MOST_LINES])
    if search["winner"] is not None:
        chosen, name = search["winner"], score_title(state).removeprefix("validation ")
        fresh = next(each for each in search["confirmations"] if each["index"] == chosen)
        unbeaten = ", a control that no searched plan beat" if search["control_won"] else ""
        text = (
            f"winner        selection {name} {fresh[state.metric]:.4f}, trial {chosen} "
            f"({fresh['origin']})"
        )
        lines.append(f"{text}{unbeaten}; `qpruner plan` prints its plan")
    return lines


def _failed(trial: dict[str, Any]) -> str:
    text = (
        f"failed        trial {trial['trial']} ({trial['from']}), {trial['failure']}: "
        f"{trial['reason']}"
    )
    return f"{text}\n  remedy: {REMEDIES[trial['failure']]}" if trial["failure"] else text


def trials(run: str, sort: str, as_json: bool) -> dict[str, Any]:
    """List the trials of a run and mark the winner."""
    snapshot = read_snapshot(RunDir(run, create=False))
    rows = [run_views.trial_row(snapshot, trial) for trial in snapshot.trials]
    columns = dict.fromkeys(itertools.chain(SHOWN, *rows))  # a cut may lack blocks
    if sort not in columns:
        rest = [name for name in columns if not name.startswith("format ")]
        raise UserError(f"no column `{sort}`; {nearest(sort, rest, 'there are')}")
    # Trials without a value in the column come last.
    rows.sort(key=lambda row: (row.get(sort) is None, row.get(sort) or 0))
    if as_json:
        pass
    elif not rows:
        click.echo("there are no trials yet")
    else:
        shown = [name for name in SHOWN if any(row[name] is not None for row in rows)]
        terminal = Terminal(quiet=False)
        plans = {trial.index: plan_of(trial) for trial in snapshot.trials}
        body = [
            [plans[row["trial"]] if name == "plan" else _cell(name, row) for name in shown]
            for row in rows
        ]
        terminal.table(shown, body)
    return {"status": "ok", "trials": rows}


def _cell(name: str, row: dict[str, Any]) -> str:
    shown = _figure(name, row[name])
    return (
        score_with_step(shown, row["rung"], row["step"])
        if name in ("loss", "accuracy") and row["rung"]
        else shown
    )


def plan(run: str, index: int | None, as_json: bool) -> dict[str, Any]:
    """Print a trial's plan as YAML, by default the winner's.

    The plan can be edited and used in another run with `--plan`.
    """
    snapshot = read_snapshot(RunDir(run, create=False))
    trial = run_views.winner(snapshot) if index is None else run_views.trial(snapshot, index)
    budget = snapshot.state.search.budget_bytes if snapshot.state.search else None
    if not as_json:
        size = (
            f"{trial.plan_bytes / 1e6:.1f} MB, {trial.mean_bits:.2f} bits a weight in blocks, "
            "without scales"
        )
        click.echo(f"# trial {trial.index} ({trial.origin}) of {snapshot.run_dir.place}: {size}")
        if budget is not None:
            click.echo(f"# {budget_text(trial.plan_bytes, budget)}")
        click.echo(f"cut: {trial.cut}  # {cut_title(trial.cut)}")
        click.echo(yaml.safe_dump(trial.plan, sort_keys=False).rstrip())
    return {
        "status": "ok",
        "trial": trial.index,
        "from": trial.origin,
        "bytes": trial.plan_bytes,
        "mean_bits": trial.mean_bits,
        "budget_bytes": budget,
        "cut": trial.cut,
        "plan": trial.plan,
    }


def compare(runs: Sequence[str], as_json: bool) -> dict[str, Any]:
    """Compare runs by their figures, the scores of their winners, and their settings.

    Scores are compared as paired differences; only settings that differ are printed.
    """
    views = [read_snapshot(RunDir(run, create=False)) for run in runs]
    facts, settings = [run_views.summary(run) for run in views], run_views.differing_settings(views)
    apart = [run_views.against(run.results, views[0].results) for run in views[1:]]
    if not as_json:
        terminal = Terminal(quiet=False)
        keys = list(dict.fromkeys(key for each in facts for key in each if key != "run"))
        body = [[key, *(_figure(key, each.get(key)) for each in facts)] for key in keys]
        places = [each.run_dir.place.rstrip("/") for each in views]
        names = [place.rsplit("/", 1)[-1] for place in places]
        headings = ["", *(names if len(set(names)) == len(set(places)) else places)]
        terminal.table(headings, body)
        for name, found in zip(headings[2:], apart, strict=True):
            terminal.say(
                f"{name} minus {headings[1]}: {run_views.against_text(found)}.", is_prose=True
            )
        if settings:
            terminal.say("Settings that differ:")
            terminal.table(
                headings, [[key, *map(_setting, values)] for key, values in settings.items()]
            )
        elif len(views) > 1:
            terminal.say("All settings are the same.")
    ends = ({"run": each["run"], "other": facts[0]["run"]} for each in facts[1:])
    differences = [end | asdict(found) for end, found in zip(ends, apart, strict=True)]
    return {
        "status": "ok",
        "runs": facts,
        "differences": differences,
        "differing_settings": settings,
    }


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _figure(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("bytes"):
        return f"{value / 1e6:.2f} MB"
    if name == "cut":
        return cut_title(value)
    if name.endswith("seconds"):
        return duration(value)
    if name == "mean_bits" or name.endswith("hours"):
        return f"{value:.2f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def report(run: str, as_json: bool) -> dict[str, Any]:
    """Write the report of a run folder again, finished or not."""
    from qpruner.report.files import write_report  # draws pictures

    folder = RunDir(run, create=False)
    page = display_name(write_report(folder))
    click.echo(page)
    return {"status": "ok", "run": folder.storage.address, "page": page}


def push(run: str, repo_id: str, what: Any, is_public: bool, as_json: bool) -> dict[str, Any]:
    """Upload the final model and its card to a model hub; no other verb publishes a model."""
    quiet_libraries()
    from qpruner.export import hub
    from qpruner.export.card import missing_remark

    folder = RunDir(run, create=False)
    done = hub.push(
        folder, repo_id, what, is_public, lambda text: click.echo(f"[push] {text}", err=True)
    )
    visibility = "private" if done.is_private else "public"
    removed = f"{counted(done.num_removed, 'earlier file')} removed, " if done.num_removed else ""
    click.echo(
        f"{done.url}: {counted(done.num_files, 'file')}, {done.num_bytes / 1e6:.1f} MB, "
        f"{removed}{visibility}"
    )
    if remark := missing_remark(done.card_lacks):
        click.echo(remark, err=True)
    return {"status": "ok", **vars(done)}
