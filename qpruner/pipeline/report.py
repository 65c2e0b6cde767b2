"""The report stage: `report.md` and `results.json` from the records."""

from __future__ import annotations

import json
from dataclasses import asdict

import yaml

from qpruner.events import StageFinished, StageStarted
from qpruner.pipeline.context import Context
from qpruner.pipeline.stage import explained
from qpruner.records import Results, RunState
from qpruner.report import markdown, table, tensorboard
from qpruner.report.marginal_effects import marginal_effects, rank_correlation
from qpruner.search.trial_records import read_trials


def report(context: Context, results: Results) -> Results:
    """Write both files; cheap, so it is done anew each time."""
    context.emit(StageStarted("report", "report.md and results.json"))
    root = context.run_dir.root
    state = context.run_dir.read_state(RunState)
    assert state, "the command says where it stands before it starts"
    config = context.config.model_dump(mode="json")
    assert results.search and results.sensitivity
    effects = marginal_effects(read_trials(context.run_dir.trials / results.search.trials_digest))
    summary = {
        "claim": table.claim(results),
        "comparisons": [asdict(each) for each in table.comparisons(results)],
        "table": [asdict(row) for row in table.rows(results)],
        "marginal_effects": effects if isinstance(effects, str) else asdict(effects),
        "rank_correlations": {
            name: rank_correlation(method, effects) for name, method in results.sensitivity.methods.items()
        },
        "records": results.model_dump(mode="json"),
        "config": config,
        "environment": state.environment,
    }
    with explained("report"):
        text = markdown.render(results, effects, root.name, yaml.safe_dump(config, sort_keys=False), state.environment)
        (root / "report.md").write_text(text, encoding="utf-8")
        (root / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        tensorboard.write_result(root, results)
    context.emit(StageFinished("report", 0.0, f"{root / 'report.md'}"))
    return results
