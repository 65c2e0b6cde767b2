"""The verbs that run stages, all up to a given one."""

import shlex
from pathlib import Path

from qpruner.cli import Facts
from qpruner.cli.terminal import Terminal
from qpruner.config.schema import RunConfig
from qpruner.export.commands import commands as served_commands
from qpruner.pipeline import run as pipeline
from qpruner.pipeline.prune import Prune
from qpruner.pipeline.report import Report
from qpruner.plans.plan import cut_title
from qpruner.report.claim import claim, finalists, headline
from qpruner.report.results import rows
from qpruner.report.run_views import finalist_row
from qpruner.report.sections import answer
from qpruner.report.snapshot import read_snapshot
from qpruner.report.tables import cuts
from qpruner.runs.logs import logging_to
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import export_command, run_root, storage_at


def run(config: RunConfig, address: str | None, until: str, quiet: bool) -> Facts:
    """Run all stages up to the stage `until` and print the result of that stage."""
    root = run_root(config.output)
    with logging_to(root):
        with Terminal(quiet=quiet) as terminal:
            results = pipeline.run(config, terminal.emit, address, until)
        if until == Prune.name and results.prune:
            terminal.show([cuts(results.prune)])
            for name, reason in results.prune.left_out.items():
                terminal.say(f"{cut_title(name)}: left out, because {reason}")
        if until == Report.name:
            snapshot = read_snapshot(RunDir(config.output, create=False))
            terminal.say(headline(snapshot.results), is_prose=True)
            terminal.show(answer(snapshot))
            terminal.say(where_next(root))
            for command in served_commands(results.serve, storage_at(root).address):
                terminal.say(f"Talk to it, once its program is installed: `{command}`")

    figures: Facts = {
        "status": "ok",
        "run": storage_at(root).address,
        "seconds": results.seconds,
    }
    if results.search:
        figures["best_plan"] = results.search.winner.plan
        figures["best_cut"] = results.search.winner.cut
    if results.serve:
        figures["serve"] = results.serve.model_dump(mode="json", include={"rows", "setting"})
    if results.finetune and results.evaluate:
        figures["claim"] = claim(results)
        figures["table"] = [vars(row) for row in rows(results)]
        compared = finalists(results.search) if results.search else []
        figures["finalists"] = [finalist_row(finalist) for finalist in compared]
    return figures


def where_next(root: Path) -> str:
    """Say in a line where the report, the plan and the model of a finished run are."""
    storage = storage_at(root)
    place = shlex.quote(storage.address)
    talk = f"`qpruner generate {place} --prompt TEXT`"
    command = export_command(root)
    if command:  # models are loaded from a local folder only
        talk = f"`{command}`, then `qpruner generate FOLDER --prompt TEXT`"
    return (
        f"The report: {storage.name}/report.html; its plan: `qpruner plan {place}`; "
        f"what the model says: {talk}"
    )
