"""The report stage: `report.md` and `results.json` from the records."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version

import yaml

from qpruner.events import StageFinished, StageStarted
from qpruner.pipeline.context import Context
from qpruner.pipeline.stage import explained
from qpruner.records import Results
from qpruner.report import markdown, table
from qpruner.report.marginal_effects import marginal_effects, rank_correlation
from qpruner.search.trial_records import read_trials

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "ray", "botorch", "hyperopt", "lm_eval")


def report(context: Context, results: Results) -> Results:
    """Write both files; cheap, so it is done anew each time."""
    context.emit(StageStarted("report", "report.md and results.json"))
    root = context.run_dir.root
    environment = _environment()
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
        "environment": environment,
    }
    with explained("report"):
        text = markdown.render(results, effects, root.name, yaml.safe_dump(config, sort_keys=False), environment)
        (root / "report.md").write_text(text, encoding="utf-8")
        (root / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    context.emit(StageFinished("report", 0.0, f"{root / 'report.md'}"))
    return results


def _environment() -> dict[str, str]:
    packages = {name: version(name) for name in ("qpruner", *PACKAGES)}
    return {"python": sys.version.split()[0], "platform": platform.platform(), **packages}
