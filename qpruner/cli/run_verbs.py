"""The verbs that read a run folder and load no model.

Every docstring is the help of its verb. The figures come from `report.run_views`.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click
import yaml

from qpruner.cli import Facts
from qpruner.cli.terminal import Terminal
from qpruner.errors import UserError
from qpruner.plans.plan import PrecisionPlan, budget_text, cut_title, plan_of
from qpruner.report import run_views
from qpruner.report.content import Cell
from qpruner.report.snapshot import GONE, RUNNING, Snapshot, read_snapshot
from qpruner.runs.logs import quiet_libraries
from qpruner.runs.records import SearchState
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import display_name
from qpruner.search.progress import score_title, score_with_step, search_lines, search_progress
from qpruner.search.trial_records import REMEDIES
from qpruner.wording import counted, duration, nearest

SHOWN = (
    "trial",
    "winner",
    "from",
    "cut",
    "status",
    "failure",
    "bytes",
    "mean_bits",
    "step",
    "loss",
    "accuracy",
    "seconds",
    "search",
    "plan",
)
"""Columns that `trials` prints, in this order."""
MOST_LINES = 10
"""Maximum number of running, and of failed, trials that `status` lists; `trials` lists all."""


def status(run: str, as_json: bool) -> Facts:
    """Show the state of a run: its stages, its trials and the best trial so far.

    It can be called in any shell, and on any machine that sees the run folder.
    """
    snapshot = read_snapshot(RunDir(run, create=False))
    facts = run_views.status(snapshot, time.time())
    if not as_json:
        terminal = Terminal(quiet=False)
        terminal.say(_headline(facts))
        rows = []
        for stage in facts["stages"]:
            seconds = _figure("seconds", stage["seconds"])
            steps = stage["steps"] or ""
            rows.append((stage["stage"], stage["state"], seconds, steps, stage["text"]))
        terminal.table(("stage", "state", "time", "steps", ""), rows)
        for name, reason in facts["left_out"].items():
            terminal.say(f"left out      {cut_title(name)}: {reason}")
        for line in _search_lines(snapshot, facts):
            terminal.say(line)
        if facts["to_compare"]:
            terminal.say(facts["to_compare"])
    return {"status": "ok", **facts}


def _headline(facts: Facts) -> str:
    outcome = facts["outcome"]
    text = f"{facts['run']}: {outcome}"
    if outcome == "done":
        return text
    if outcome == "failed":
        return f"{text}: {facts['error']}"
    quiet = duration(facts["seconds_since_sign_of_life"])
    process = f"on {facts['host']} (process {facts['pid']})"
    if outcome == RUNNING:
        return f"{text} {process}, last sign of life {quiet} ago"
    if outcome == GONE:
        text = f"{facts['run']}: no sign of life for {quiet} {process}: {GONE}"
    return f"{text}; repeat the command to go on, in {facts['folder']}: {facts['command']}"


def _search_lines(run: Snapshot, facts: Facts) -> list[str]:
    """Format the search: its counts, the trials under way, failures and the winner."""
    state = run.state.search
    if state is None:
        return []
    is_running = facts["outcome"] == RUNNING
    lines = []
    for line, best in search_lines(state, search_progress(state, run.trials), is_running):
        lines.append(f"{line} [{plan_of(best)}]" if best else line)

    search = facts["search"]
    word = "under way" if is_running else "begun"
    for trial in search["under_way"][:MOST_LINES]:
        title = f"trial {trial['trial']} ({trial['from']}), {cut_title(trial['cut'])}"
        lines.append(f"{word:<12}  {title}, step {trial['step']}/{state.steps}")
    lines += [_failed(trial) for trial in search["failures"][:MOST_LINES]]
    if search["winner"] is not None:
        lines.append(_winner_line(state, search))
    return lines


def _winner_line(state: SearchState, search: Facts) -> str:
    winner = search["winner"]
    confirmed = next(row for row in search["finalists"] if row["index"] == winner)
    score = f"{score_title(state).removeprefix('validation ')} {confirmed[state.metric]:.4f}"
    unbeaten = ", a control that no searched plan beat" if search["control_won"] else ""
    return (
        f"winner        selection {score}, trial {winner} ({confirmed['origin']}){unbeaten}; "
        "`qpruner plan` prints its plan"
    )


def _failed(trial: Facts) -> str:
    failure = trial["failure"]
    text = f"failed        trial {trial['trial']} ({trial['from']}), {failure}: {trial['reason']}"
    return f"{text}\n  remedy: {REMEDIES[failure]}" if failure else text


def trials(run: str, sort: str, as_json: bool) -> Facts:
    """List the trials of a run and mark the winner."""
    snapshot = read_snapshot(RunDir(run, create=False))
    rows = [run_views.trial_row(snapshot, trial) for trial in snapshot.trials]
    columns = dict.fromkeys(itertools.chain(SHOWN, *rows))  # a cut may lack blocks
    if sort not in columns:
        named = [name for name in columns if not name.startswith("format ")]
        raise UserError(f"no column `{sort}`; {nearest(sort, named, 'there are')}")
    # Trials without a value in the column come last.
    rows.sort(key=lambda row: (row.get(sort) is None, row.get(sort) or 0))
    if not as_json:
        _print_trials(snapshot, rows)
    return {"status": "ok", "trials": rows}


def _print_trials(run: Snapshot, rows: Sequence[Facts]) -> None:
    if not rows:
        click.echo("there are no trials yet")
        return
    plans = {trial.index: plan_of(trial) for trial in run.trials}
    shown = [name for name in SHOWN if any(row[name] is not None for row in rows)]
    body = [[_cell(name, row, plans) for name in shown] for row in rows]
    Terminal(quiet=False).table(shown, body)


def _cell(name: str, row: Facts, plans: Mapping[int, PrecisionPlan]) -> Cell:
    if name == "plan":
        return plans[row["trial"]]
    figure = _figure(name, row[name])
    if name in ("loss", "accuracy") and row["rung"]:
        return score_with_step(figure, row["rung"], row["step"])
    return figure


def plan(run: str, index: int | None, as_json: bool) -> Facts:
    """Print a trial's plan as YAML, by default the winner's.

    The plan can be edited and used in another run with `--plan`.
    """
    snapshot = read_snapshot(RunDir(run, create=False))
    trial = run_views.winner(snapshot) if index is None else run_views.trial(snapshot, index)
    search = snapshot.state.search
    budget = search.budget_bytes if search else None
    if not as_json:
        size = f"{trial.plan_bytes / 1e6:.1f} MB"
        bits = f"{trial.mean_bits:.2f} bits a weight in blocks, without scales"
        origin = f"trial {trial.index} ({trial.origin}) of {snapshot.run_dir.place}"
        click.echo(f"# {origin}: {size}, {bits}")
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


def compare(runs: Sequence[str], as_json: bool) -> Facts:
    """Compare runs by their figures, the scores of their winners, and their settings.

    Scores are compared as paired differences; only settings that differ are printed.
    """
    snapshots = [read_snapshot(RunDir(run, create=False)) for run in runs]
    facts = [run_views.summary(snapshot) for snapshot in snapshots]
    settings = run_views.differing_settings(snapshots)
    first, *others = snapshots
    against_first = [run_views.against(other.results, first.results) for other in others]
    if not as_json:
        headings = _run_names(snapshots)
        _print_figures(headings, facts)
        terminal = Terminal(quiet=False)
        for name, against in zip(headings[1:], against_first, strict=True):
            text = run_views.against_text(against)
            terminal.say(f"{name} minus {headings[0]}: {text}.", is_prose=True)
        if settings:
            terminal.say("Settings that differ:")
            body = [[key, *map(_setting, values)] for key, values in settings.items()]
            terminal.table(["", *headings], body)
        elif others:
            terminal.say("All settings are the same.")

    other = facts[0]["run"]
    differences = [
        {"run": of_run["run"], "other": other, **asdict(against)}
        for of_run, against in zip(facts[1:], against_first, strict=True)
    ]
    return {
        "status": "ok",
        "runs": facts,
        "differences": differences,
        "differing_settings": settings,
    }


def _run_names(snapshots: Sequence[Snapshot]) -> list[str]:
    """Return the names of run folders, or their whole paths if two names are the same."""
    places = [snapshot.run_dir.place.rstrip("/") for snapshot in snapshots]
    names = [place.rsplit("/", 1)[-1] for place in places]
    return names if len(set(names)) == len(set(places)) else places


def _print_figures(headings: Sequence[str], facts: Sequence[Facts]) -> None:
    keys = dict.fromkeys(itertools.chain(*facts))
    del keys["run"]
    body = [[key, *(_figure(key, of_run.get(key)) for of_run in facts)] for key in keys]
    Terminal(quiet=False).table(["", *headings], body)


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


def report(run: str, as_json: bool) -> Facts:
    """Write the report of a run folder again, finished or not."""
    from qpruner.report.files import write_report  # draws pictures

    folder = RunDir(run, create=False)
    page = display_name(write_report(folder))
    click.echo(page)
    return {"status": "ok", "run": folder.storage.address, "page": page}


def push(run: str, repo_id: str, what: Any, is_public: bool, as_json: bool) -> Facts:
    """Upload the final model and its card to a model hub; no other verb publishes a model."""
    quiet_libraries()
    from qpruner.export import hub
    from qpruner.export.card import missing_remark

    def notify(text: str) -> None:
        click.echo(f"[push] {text}", err=True)

    pushed = hub.push(RunDir(run, create=False), repo_id, what, is_public, notify)
    parts = [counted(pushed.num_files, "file"), f"{pushed.num_bytes / 1e6:.1f} MB"]
    if pushed.num_removed:
        parts.append(f"{counted(pushed.num_removed, 'earlier file')} removed")
    parts.append("private" if pushed.is_private else "public")
    click.echo(f"{pushed.url}: {', '.join(parts)}")
    remark = missing_remark(pushed.card_lacks)
    if remark:
        click.echo(remark, err=True)
    return {"status": "ok", **vars(pushed)}
