"""Make mixed-precision models as the pipeline does: pack groups into a bank, then assemble a plan from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qpruner.hf  # noqa: F401
from qpruner.config.schema import LoraConfig, RunConfig
from qpruner.data.encoding import save_encoded
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.layout import group_linears, table_paths
from qpruner.models.loading import load_tokenizer
from qpruner.plans.plan import EMBEDDINGS
from qpruner.quantization.assembly import assemble, attach_adapters
from qpruner.quantization.bank import INDEX, BankIndex, GroupJob, IndexEntry, build_group
from qpruner.quantization.formats import DENSE
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import children, file_digest, write_json
from qpruner.training.table_rows import Candidate, CandidateJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA = LoraConfig(rank=4, alpha=8)
GROUP = "projection"
DTYPE = "bfloat16"
LEVELS = ("nf4", "int8")
PATTERN = (*LEVELS, DENSE)
"""Formats of successive groups."""


def fill_bank(
    checkpoint: Path,
    bank: Path,
    lora: LoraConfig = LORA,
    dtype: str = DTYPE,
    group: str = GROUP,
    levels: tuple[str, ...] = LEVELS,
    tables: tuple[str, ...] = (),
) -> list[str]:
    """Pack all groups of a checkpoint in each of some formats, embeddings and head in `tables`; return the blocks'."""
    config = AutoConfig.from_pretrained(checkpoint)
    groups = group_linears(config, group)
    for name, paths in groups.items():
        build_group(GroupJob(name, paths, levels, checkpoint, bank, dtype, lora, seed=0))
    for name, path in table_paths(config).items():
        build_group(GroupJob(name, (path,), tables, checkpoint, bank, dtype, None, seed=0))
    seal(bank)
    return list(groups)


def seal(bank: Path) -> None:
    """Write an index of all files in a bank."""
    files = {str(path.relative_to(bank)): file_digest(path) for path in sorted(bank.glob("*/*.safetensors"))}
    entries = {
        name: IndexEntry(inputs="test", sha256=sha256, residual_ratio=1.0, error=0.0) for name, sha256 in files.items()
    }
    write_json(bank / INDEX, BankIndex(digest="test", files=entries))


def mixed_plan(names: list[str], pattern: tuple[str, ...]) -> dict[str, str]:
    """Make a plan that repeats a pattern of formats over the groups."""
    return {name: pattern[position % len(pattern)] for position, name in enumerate(names)}


def row_job(config: RunConfig, folder: Path, pattern: tuple[str, ...] = LEVELS, seed: int | None = 0) -> CandidateJob:
    """Make the job of a row whose plan repeats the formats, in a run that has a bank."""
    run_dir = RunDir(config.output)
    names = [name.removesuffix(".safetensors") for name in children(run_dir.stage("bank") / LEVELS[0])]
    places = run_dir.cut("cut-20"), run_dir.stage("bank")
    row = Candidate("searched", "searched", *places, mixed_plan(names, pattern), folder, seed)
    return CandidateJob(config, row, run_dir.stage("prepare") / "data", threads=1)


def mixed_model(checkpoint: Path, bank: Path, plan: Mapping[str, str]) -> PreTrainedModel:
    return assemble(checkpoint, bank, GROUP, plan, DTYPE)[0].eval()


def token_ids() -> torch.Tensor:
    """Return random token ids, ``(2, 11)``."""
    return torch.randint(3, 400, (2, 11), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=token_ids(), use_cache=False).logits
    return logits


def final_model(tiny_model: Path, root: Path) -> Path:
    """Write a final model of several formats, embeddings too, with an adapter on every layer; return its folder."""
    names = fill_bank(tiny_model, root / "bank", tables=("int8",))
    plan = mixed_plan(names, PATTERN) | {EMBEDDINGS: "int8"}
    model, starts = assemble(tiny_model, root / "bank", GROUP, plan, DTYPE)
    save_checkpoint(model, load_tokenizer(str(tiny_model)), root / "final")
    adapted = attach_adapters(model, starts, LORA, GROUP, seed=0)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(root / "final"))
    return root / "final"


def off_by(logits: torch.Tensor, final: Path) -> float:
    """Compute the difference of logits from those of a final model, relative to the effect of its adapter."""
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
    save_encoded([{"input_ids": row, "labels": row} for row in rows], root / "prepare" / "data" / "confirmation")
    return root
