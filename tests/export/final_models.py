"""Make tiny runs whose sizes all servers take, with blocks alike or of different widths."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import command
from made_tensors import seeded
from mixed_models import GROUP, LORA, bank_source, groups_of, mixed_plan
from tiny_families import family_model

from qpruner.data.encoding import save_encoded
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import load_tokenizer
from qpruner.plans.plan import EMBEDDINGS
from qpruner.pruning.surgery import cut
from qpruner.quantization.assembly import assemble, attach_adapters

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "sliding_window": None,
}
SIZES |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "sliding_window": None,
}
KEPT = {0: {"attention": (1,), "mlp": tuple(range(64))}, 2: {"mlp": tuple(range(32, 160))}}
"""Units that blocks of different widths keep."""
SEED = seeded(1)


def pruned_model(
    family: str, tokenizer: Path, folder: Path, is_ragged: bool, **others: Any
) -> Path:
    """Write a tiny model as pruning leaves it."""
    options = dict(SIZES)
    if family.startswith("gemma"):
        options |= {"layer_types": ["full_attention"] * 3, "sliding_window": 512}
    model = family_model(family, **options | others)
    if is_ragged:
        cut(model, KEPT)
    save_checkpoint(model.to(torch.bfloat16), load_tokenizer(str(tokenizer)), folder)
    return folder


def run_of(pruned: Path, root: Path, pattern: tuple[str, ...], table: str = "") -> Path:
    """Write the parts of a run that an export reads: groups have these formats in turn, every layer
    an adapter."""
    bank = bank_source(pruned, root / "bank")
    plan = mixed_plan(groups_of(bank), pattern)
    if table:
        plan[EMBEDDINGS] = table
    model, starts = assemble(bank, plan)
    save_checkpoint(model, load_tokenizer(str(pruned)), root / "final")
    adapted = attach_adapters(model, starts, LORA, GROUP, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=SEED)
    adapted.save_pretrained(str(root / "final"))
    rows = torch.randint(3, 400, (3, 40), generator=SEED).tolist()
    encoded = [{"input_ids": row, "labels": row} for row in rows]
    save_encoded(encoded, root / "prepare" / "data" / "confirmation")
    return root


def run_of_llama(
    tokenizer: Path, root: Path, pattern: tuple[str, ...], table: str = "", is_ragged: bool = True
) -> Path:
    return run_of(
        pruned_model("llama", tokenizer, root / "pruned", is_ragged), root / "run", pattern, table
    )


def outcome_of(run: object, *options: object) -> dict[str, Any]:
    """Export a run by the command line; return what it prints as JSON."""
    done = command("export", run, *options, "--json")
    assert done.exit_code == 0, done.output
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome | {"output": done.output}
