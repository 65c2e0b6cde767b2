"""`final/README.md`: the model card that hubs show, written once the model is measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load

from qpruner.report.markdown import measured
from qpruner.report.snapshot import Snapshot
from qpruner.report.table import SEARCHED, rows

METRICS = {"acc": "accuracy", "acc_norm": "accuracy"}
"""lm-eval's names to the hub's."""


def model_card(run: Snapshot) -> str:
    """The card of a whole run's final model."""
    assert run.results.evaluate and run.results.search
    base = run.state.config["model"]["source"]
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        license=_license(base),
        datasets=_datasets(run.state.config) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qpruner", "pruning", "mixed-precision", "lora"],
        model_name=run.name,
        eval_results=list(_measured(run)),
    )
    winner = next(row for row in rows(run.results) if row.name == SEARCHED)
    return "\n".join(
        [
            "---",
            data.to_yaml(),
            "---",
            "",
            f"# {run.name}",
            "",
            f"`{base}`, pruned, quantized to {winner.mean_bits:.2f} mean bits by a searched plan and fine-tuned by "
            f"qpruner: {winner.measured_bytes / 1e6:.1f} MB.",
            "",
            "```python",
            "import qpruner.hf  # registers the mixed-precision quantizer and blocks of different widths",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this folder")',
            'tokenizer = AutoTokenizer.from_pretrained("this folder")',
            "```",
            "",
            "## Measured",
            "",
            *measured(run.results),
        ]
    )


def _measured(run: Snapshot) -> Iterator[EvalResult]:
    """The final model's scores: those of the first training seed, whose adapter this is."""
    assert run.results.evaluate
    row = next(row for row in run.results.evaluate.rows if row.name == SEARCHED)
    for score in row.scores:
        yield EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=f"{score.task} ({score.num_questions} questions)",
            metric_type=METRICS.get(score.metric, score.metric),
            metric_value=round(score.value, 4),
        )


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith(("/", ".", "~", "package:")) and not Path(source).exists()


def _license(base: str) -> str | None:
    """What the base model's own card says, where that is at hand."""
    card = Path(base).expanduser() / "README.md"
    metadata = metadata_load(card) if card.is_file() else None
    return metadata.get("license") if metadata else None


def _datasets(config: dict[str, Any]) -> list[str]:
    """Hub data sets that the model was fine-tuned on."""
    return list(dict.fromkeys(each["source"] for each in config["data"]["train"] if _is_hub_id(each["source"])))
