"""Make mixed-precision models as the pipeline does: assemble a plan from a bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qpruner.hf  # noqa: F401
from qpruner.config.schema import LoraConfig, RunConfig
from qpruner.data.encoding import save_encoded
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_tokenizer
from qpruner.pipeline.places import Places
from qpruner.plans.plan import EMBEDDINGS
from qpruner.quantization.assembly import assemble, attach_adapters
from qpruner.quantization.bank import BankSource
from qpruner.quantization.formats import DENSE
from qpruner.runs.records import CONFIRMATION, FineTune, PrepareRecord, PruneRecord, Results
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import fetch
from qpruner.training.jobs import FineTuneJob, Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA = LoraConfig(rank=4, alpha=8)
GROUP = "projection"
DTYPE = "bfloat16"
LEVELS = ("nf4", "int8")
PATTERN = (*LEVELS, DENSE)
"""Formats of successive groups."""


def bank_source(
    checkpoint: Path, folder: Path, lora: LoraConfig = LORA, dtype: str = DTYPE, group: str = GROUP
) -> BankSource:
    """Describe a bank of a checkpoint; its entries are made when a plan needs them."""
    return BankSource(folder, checkpoint, group, dtype, lora, seed=0)


def groups_of(bank: BankSource) -> list[str]:
    """Name the groups of the blocks."""
    return list(group_linears(AutoConfig.from_pretrained(fetch(bank.checkpoint)), bank.grouping))


def bank_of_run(config: RunConfig) -> BankSource:
    """Return the bank of a run's last cut."""
    run_dir = RunDir(config.output)
    prepared = run_dir.read_record("prepare", PrepareRecord)
    pruned = run_dir.read_record("prune", PruneRecord)
    assert pruned
    places = Places(config, run_dir, Results(prepare=prepared, prune=pruned))
    return places.bank_of(list(pruned.cuts)[-1])


def mixed_plan(names: list[str], pattern: tuple[str, ...]) -> dict[str, str]:
    """Make a plan that repeats a pattern of formats over the groups."""
    return {name: pattern[position % len(pattern)] for position, name in enumerate(names)}


def row_job(
    config: RunConfig, folder: Path, pattern: tuple[str, ...] = LEVELS, seed: int | None = 0
) -> FineTuneJob:
    """Make the job of a row whose plan repeats the formats, in a run that has a bank.

    It is scored on the judging rows.
    """
    bank = bank_of_run(config)
    data = RunDir(config.output).stage("prepare") / "data"
    return plan_job(config, bank, data, mixed_plan(groups_of(bank), pattern), folder, seed)


def plan_job(
    config: RunConfig,
    bank: BankSource,
    data: Path,
    plan: dict[str, str],
    folder: Path,
    seed: int | None = 0,
) -> FineTuneJob:
    """Make the job of a plan that is scored on the judging rows."""
    record = FineTune(
        digest=folder.name,
        name="searched",
        origin="searched",
        seed=seed,
        cut=bank.folder.name,
        plan=plan,
        plan_bytes=0,
        mean_bits=0.0,
        num_parameters=0,
    )
    return FineTuneJob(
        record=record,
        title="searched",
        bank=bank,
        folder=folder,
        trained=folder / "trained",
        config=config,
        data=data,
        scoring=Scoring(rows=CONFIRMATION),
    )


def held_out_scoring(config: RunConfig, text: Path | None = None) -> Scoring:
    """Return the scoring on the held-out tasks of a configuration, and on a folder of text."""
    settings = config.evaluate
    return Scoring(
        tasks=settings.tasks, limit=settings.limit, num_fewshot=settings.num_fewshot, text=text
    )


def job_in(job: FineTuneJob, folder: Path, **fields: Any) -> FineTuneJob:
    """Return the job in another folder, with these fields of its record changed."""
    record = job.record.model_copy(update=fields)
    return replace(job, folder=folder, trained=folder / "trained", record=record)


def mixed_model(bank: BankSource, plan: Mapping[str, str]) -> PreTrainedModel:
    return assemble(bank, plan)[0].eval()


def token_ids() -> torch.Tensor:
    """Return random token ids, ``(2, 11)``."""
    return torch.randint(3, 400, (2, 11), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits


def final_model(tiny_model: Path, root: Path) -> Path:
    """Write a final model of several formats, embeddings too, with an adapter on every layer;
    return its folder."""
    bank = bank_source(tiny_model, root / "bank")
    model, starts = assemble(bank, mixed_plan(groups_of(bank), PATTERN) | {EMBEDDINGS: "int8"})
    save_checkpoint(model, load_tokenizer(str(tiny_model)), root / "final")
    adapted = attach_adapters(model, starts, LORA, GROUP, seed=0)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(root / "final"))
    return root / "final"


def off_by(logits: torch.Tensor, final: Path) -> float:
    """Compute the difference of logits from those of a final model, relative to the effect of its
    adapter."""
    model = AutoModelForCausalLM.from_pretrained(final)
    expected = logits_of(model).float()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return float((logits.float() - expected).norm() / (logits_of(model).float() - expected).norm())


def finished_run(tiny_model: Path, root: Path) -> Path:
    """Write the parts of a run folder that an export reads: a final model and confirmation rows."""
    final_model(tiny_model, root)
    rows = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(1)).tolist()
    save_encoded(
        [{"input_ids": row, "labels": row} for row in rows],
        root / "prepare" / "data" / "confirmation",
    )
    return root
