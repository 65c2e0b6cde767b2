"""What is said of a winner that was compared with nothing after its fine-tune, and of a comparison that is not done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from conftest import with_key
from made_run import STARTED, MadeRun

from qpruner.cli.main import main
from qpruner.report.claim import claim, margin
from qpruner.report.files import write_report
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.records import StageState

COMMAND = "qpruner run my.yaml --set search.max_trials=200 --set finetune.compare=true"


def status(root: Path) -> tuple[dict[str, Any], str]:
    """`qpruner status` as data and as text."""
    outputs = [CliRunner().invoke(main, ["status", str(root), *form]).output for form in (("--json",), ())]
    return json.loads(outputs[0]), outputs[1]


def test_a_winner_alone_is_told_with_the_way_to_compare_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    report = {"report": StageState(state="done", started=STARTED, seconds=1.0)}
    made = MadeRun(root, num_trials=40, num_blocks=2, until="evaluate", stages=report)
    (root / "final").mkdir()
    config = with_key(made.state.config, "finetune.compare", False)
    made.run.write_state(made.state.model_copy(update={"config": config}))
    write_report(made.run)
    alone = read_snapshot(made.run)
    results = alone.results
    assert results.finetune and results.evaluate and results.search
    [tuned], scored = results.finetune.candidates, results.evaluate.rows
    base, pruned, _, winner = (sum(score.value for score in row.scores) / 2 for row in scored)
    lead, fresh, nothing = claim(results).splitlines()
    for figures in (
        "Searched: gp, trial 11, 92.00 MB. It is 3.0 times smaller than the base model.",
        f"validation loss is {tuned.validation_loss:.4f} and its confirmation loss {tuned.confirmation_loss:.4f}",
        f"test acc {winner:.3f} (without a fine-tune, base {base:.3f}, pruned {pruned:.3f})",
    ):
        assert figures in lead
    assert fresh.endswith(margin(results.search)[1:]) and "a margin of" in fresh
    assert "nothing is claimed at equal bytes" in nothing
    facts, text = status(root)
    markdown = (root / "report.md").read_text()
    assert f"`{COMMAND}`" in facts["to_compare"] and COMMAND in text and f"`{COMMAND}`" in markdown
    assert f"<code>{COMMAND}</code>" in (root / "report.html").read_text()
    assert "finetune.compare" not in (root / "final" / "README.md").read_text(), "its readers have no such run"
    assert (alone.standing, alone.missing) == ("Finished.", None)
    assert [each["stage"] for each in facts["stages"]][-3:] == ["finetune", "evaluate", "report"]
    assert "| interval |" not in markdown, "a term of the comparison's claim"


def test_without_its_comparison_the_winner_is_reported_whole(tmp_path: Path) -> None:
    root = tmp_path / "run"
    begun = {"comparison": StageState(state="running", started=STARTED)}
    made = MadeRun(root, 6, 2, until="evaluate", stages=begun, outcome="interrupted")
    (root / "final").mkdir()
    write_report(made.run)
    run, summary = read_snapshot(made.run), json.loads((root / "results.json").read_text())
    how = "Interrupted in stage comparison; the same command goes on from here."
    assert run.standing == f"The winner is finished, its comparison is not. {how}"
    assert run.missing == "There is no result yet of: comparison."
    assert [row["name"] for row in summary["table"]] == ["searched"] and summary["claim"] == claim(run.results)
    assert run.standing in (root / "report.md").read_text()
    assert "Measured" in (root / "final" / "README.md").read_text()
    facts, text = status(root)
    assert facts["to_compare"] is None and "finetune.compare" not in text, "it is asked for"
    last = [(each["stage"], each["state"]) for each in facts["stages"]][-2:]
    assert last == [("comparison", "interrupted"), ("report", "waiting")]

    compared = read_snapshot(MadeRun(tmp_path / "compared", num_trials=6, num_blocks=2).run)
    found = compared.results
    assert found.comparison and found.evaluate and found.candidates == found.comparison.candidates
    assert found.scores == (*found.evaluate.rows[:3], *found.comparison.rows)
    assert found.inference == found.comparison.inference, "memory and speed as measured beside the others"
    assert compared.how_to_compare is None and compared.standing == "Finished."
