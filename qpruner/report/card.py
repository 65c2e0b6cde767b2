"""Writes `final/README.md`: the model card that hubs show, once the model is measured."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from qpruner.config.schema import RunConfig
from qpruner.data.sources import BUILDERS
from qpruner.export.card import front_matter, loading_section
from qpruner.report.markdown import code, parts_text, prose
from qpruner.report.results import SEARCHED, rows
from qpruner.report.sections import measured
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import GIVEN
from qpruner.runs.storage import read_text
from qpruner.wording import counted

METRICS = {"acc": "accuracy", "acc_norm": "accuracy"}
"""lm-eval's names to the hub's."""
SPDX_ON_HUB = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "mpl-2.0", "unlicense", "cc0-1.0")
"""SPDX identifiers, in lower case, that are the hub's as well; what a package says in other words is not guessed at."""


def model_card(run: Snapshot, base_card: str | None) -> str:
    """Write the card of a whole run's final model; `base_card` is the base model's own, where it is at hand."""
    assert run.results.evaluate and run.results.search
    config = run.state.config
    base, stated = config["model"]["source"], _stated(config)
    data = ModelCardData(
        **_known(config, Path(run.state.folder), base_card or "") | stated,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qpruner", "pruning", "mixed-precision", "lora"],
        model_name=run.name,
        eval_results=list(_measured(run)),
    )
    winner = next(row for row in rows(run.results) if row.name == SEARCHED)
    expanded = ""
    if (prepared := run.results.prepare) and prepared.source_bytes is not None:  # from a .gguf file, mostly quantized
        size = f"{prepared.source_bytes / 1e6:.1f} MB"
        expanded = f" The base's weights were expanded from {code(Path(base).name)}, a file of {size}."
    return "\n".join(
        [
            "---",
            data.to_yaml(),
            "---",
            "",
            f"# {prose(run.name)}",
            "",
            f"{code(base)}, pruned, quantized to {winner.mean_bits:.2f} mean bits by {_chosen(run)} and fine-tuned "
            f"by qpruner {run.state.environment['qpruner']}: {winner.measured_bytes / 1e6:.1f} MB. Of the fine-tunes "
            f"below it is that of training seed {winner.seeds[0]}.{expanded}",
            "",
            loading_section("packed"),
            "## Measured",
            "",
            "\n\n".join(parts_text(measured(run.results))),
            "",
        ]
    )


def _measured(run: Snapshot) -> Iterator[EvalResult]:
    """Yield the final model's scores: those of the first training seed, whose adapter this is."""
    assert run.results.evaluate
    row = next(row for row in run.results.evaluate.rows if row.name == SEARCHED and row.seed is not None)
    for score in row.scores:
        yield EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=f"{score.task} ({counted(score.num_questions, 'question')})",
            metric_type=METRICS.get(metric := score.metric.partition(",")[0], metric),
            metric_name=score.metric,
            metric_value=round(score.value, 4),
        )


def _chosen(run: Snapshot) -> str:
    """Name where the plan came from, for people who know nothing of the run."""
    search = run.results.search
    assert search
    if search.best_origin == GIVEN:
        return "a plan that was given, not searched for,"
    if search.control_won:
        return f"the plan {search.best_origin}, which no searched plan beat,"
    return "a searched plan"


def other_base_remark(config: RunConfig) -> str | None:
    """Remark on a card that names another base model than the one that is pruned; None where that is not known."""
    stated, base = config.card.base_model, config.model.source
    if stated in (None, base) or not _is_hub_id(base, Path()):
        return None
    return (
        f"`card.base_model` is {stated}, but `model.source` is {base}: if the section `card` was copied with another "
        "model's configuration, leave it out, or state base model, licence and data sets of this one"
    )


def _is_hub_id(source: str, folder: Path) -> bool:
    """Tell whether a source is a hub's: no file or folder, seen from the folder that the command was given in."""
    return (
        source.count("/") == 1
        and not source.startswith(("/", ".", "~", "package:"))
        and Path(source).suffix not in (*BUILDERS, ".gguf")
        and not (folder / source).exists()
    )


def base_card(run: Snapshot) -> str | None:
    """Read the base model's own card, which lies beside its files; None where it has none or they are gone."""
    assert run.results.prepare
    try:
        return read_text(run.run_dir.base_model(run.results.prepare) / "README.md")
    except (OSError, UnicodeDecodeError):  # it is not ours: what is wrong with it must not cost the report
        return None


def _stated(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the user states."""
    return {key: value for key, value in config.get("card", {}).items() if value is not None}


def _known(config: dict[str, Any], folder: Path, base_card: str) -> dict[str, Any]:
    """Return what the sources tell; a licence that is stated replaces all that is known of one."""
    source = config["model"]["source"]
    base = source if _is_hub_id(source, folder) else None
    licence = {} if "license" in _stated(config) else _license(base_card, base) or _package_license(source)
    data = dict.fromkeys(each["source"] for each in config["data"]["train"])
    return {"base_model": base, "datasets": [each for each in data if _is_hub_id(each, folder)] or None, **licence}


def _license(card: str, base: str | None) -> dict[str, Any]:
    """Return the licence of the base model's card; a file that it names is one of its repository, if it has one."""
    metadata = front_matter(card)
    licence = {name: metadata[name] for name in ("license", "license_name", "license_link") if metadata.get(name)}
    link = licence.get("license_link")
    if link and "://" not in str(link) and base:
        licence["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return licence


def _package_license(base: str) -> dict[str, Any]:
    """Return the licence in the metadata of the installed package that a model lies in."""
    if not base.startswith("package:"):
        return {}
    package = base.removeprefix("package:").partition("/")[0]
    owners = set(importlib.metadata.packages_distributions().get(package, ()))
    metadata = [importlib.metadata.metadata(owner) for owner in owners]
    keys = ("License-Expression", "License")
    licence = {next((each[key] for key in keys if key in each), "").lower() for each in metadata}
    return {"license": licence.pop()} if len(licence) == 1 and licence <= set(SPDX_ON_HUB) else {}
