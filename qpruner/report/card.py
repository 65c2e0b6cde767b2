"""Writes the model card `final/README.md`, which hubs show, once the final model is evaluated."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from qpruner.data.sources import BUILDERS
from qpruner.export.card import front_matter, loading_section
from qpruner.plans.plan import cut_title
from qpruner.report.content import code, markdown, prose
from qpruner.report.results import by_row, winner_row
from qpruner.report.sections import measured
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import SEARCHED
from qpruner.runs.storage import read_text
from qpruner.wording import counted

METRICS = {"acc": "accuracy", "acc_norm": "accuracy"}
"""Name of a metric in lm-eval -> its name on the hub."""


def model_card(run: Snapshot) -> str:
    """Return the final model's card.

    If `card.license` is not set, the licence comes from the base model's card.
    """
    assert run.results.prepare and run.results.search
    search = run.results.search
    config = run.state.config
    base = config["model"]["source"]
    stated = {name: value for name, value in config.get("card", {}).items() if value is not None}
    base_card = ""
    if "license" not in stated:
        # an unreadable card must not fail the report
        with contextlib.suppress(OSError, UnicodeDecodeError):
            base_card = read_text(run.run_dir.base_model(run.results.prepare) / "README.md") or ""
    data = ModelCardData(
        **_known(config, Path(run.state.folder), base_card) | stated,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qpruner", "pruning", "mixed-precision", "lora"],
        model_name=run.name,
        eval_results=list(_task_scores(run)),
    )
    winner = winner_row(run.results)
    lead = (
        f"{code(base)}, {cut_title(search.winner.cut)}, quantized to {winner.mean_bits:.2f} mean "
        f"bits by a plan from {winner.origin} (`{winner.title}` below), fine-tuned by qpruner "
        f"{run.state.environment['qpruner']} with training seed {winner.seeds[0]}: "
        f"{winner.measured_bytes / 1e6:.1f} MB. The table below has every seed."
    )
    blocks = [
        f"---\n{data.to_yaml()}\n---",
        f"# {prose(run.name)}",
        lead,
        loading_section("packed").rstrip(),
        "## Measured",
        *markdown(measured(run.results)),
    ]
    return "\n\n".join(blocks) + "\n"


def _task_scores(run: Snapshot) -> Iterator[EvalResult]:
    """Yield the final model's score on each task: the winner's, under the first training seed."""
    final = by_row(run.results)[SEARCHED][0]
    for score in final.tasks:
        metric = score.metric.partition(",")[0]
        yield EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=f"{score.task} ({counted(score.num_questions, 'question')})",
            metric_type=METRICS.get(metric, metric),
            metric_name=score.metric,
            metric_value=round(score.value, 4),
        )


def _is_hub_id(source: str, folder: Path) -> bool:
    """Return True if a source is the id of a model or data set on a hub, not a local path.

    Local paths are relative to `folder`.
    """
    return (
        source.count("/") == 1
        and not source.startswith(("/", ".", "~", "package:"))
        and Path(source).suffix not in (*BUILDERS, ".gguf")
        and not (folder / source).exists()
    )


def _known(config: dict[str, Any], folder: Path, base_card: str) -> dict[str, Any]:
    """Return the card metadata that is known without the section `card`.

    These are the hub ids of the base model and of the data sets, and the licence.
    """
    source = config["model"]["source"]
    base = source if _is_hub_id(source, folder) else None
    data = dict.fromkeys(rows["source"] for rows in config["data"]["train"])
    metadata = front_matter(base_card)
    licence = {
        name: metadata[name]
        for name in ("license", "license_name", "license_link")
        if metadata.get(name)
    }
    link = licence.get("license_link")
    if link and "://" not in str(link) and base:  # a path in the base model's repository
        licence["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return {
        "base_model": base,
        "datasets": [name for name in data if _is_hub_id(name, folder)] or None,
        **licence,
    }
