"""The final model in forms that other tools load: dense with the adapter merged in, or as peft knows it.

An export is written aside, loaded again and its logits compared with the final model's before it gets its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qpruner.data import load_encoded
from qpruner.errors import StageError, UserError
from qpruner.hf import PEFT_BASE, load
from qpruner.mirror import fetch
from qpruner.models.checkpoint import dense_tensors, save_checkpoint
from qpruner.models.loading import OnLoading, checkpoint_config, device, load_tokenizer, untold
from qpruner.rundir import RunDir, exists, publish_folder

if TYPE_CHECKING:
    import torch

Form = Literal["merged", "peft"]
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
NUM_ROWS = 8
MOST_DIVERGENCE = 0.05
"""Nats a token that an export may diverge from the final model: more than rounding does, less than a lost adapter.
The demo's model (30 blocks, half of them at 8 bits, whose inputs are rounded, too) diverges by 0.017 when merged, by
0.010 as peft loads it, by 0.0085 when its adapters are merely held in float32, and by 0.22 without them (2026-11)."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where it is.
        is_plain: Whether it loads without `import qpruner.hf`.
        divergence: Mean Kullback-Leibler divergence from the final model's next-token distribution, in nats.
        agreement: Share of positions at which both predict the same token.
        num_positions: Positions compared.
    """

    folder: Path
    is_plain: bool
    divergence: float
    agreement: float
    num_positions: int


def export(run: RunDir, form: Form, target: Path, told: OnLoading = untold) -> Exported:
    """Write the final model in another form.

    Args:
        run: A run with a final model.
        form: `merged`: dense weights with the adapter added in; `peft`: the adapter, and the quantized model below it.
        target: A folder that does not exist yet.
        told: Told how far it is.

    Raises:
        UserError: If there is no final model, or the target exists.
        StageError: If what was written does not predict what the final model does.
        CorruptFile: If a weight file cannot be read.
    """
    final = run.root / "final"
    if not exists(final / ADAPTER_FILES[0]):
        raise UserError(f"{run.place} has no final model: repeat `qpruner run` until it has fine-tuned one")
    if target.exists():
        raise UserError(f"{target} exists: delete it or name another folder with `--out`")
    final = fetch(final)
    scratch = target.with_name(f".{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        _write_merged(final, scratch, told) if form == "merged" else _write_peft(final, scratch, target)
        rows = load_encoded(run.stage("prepare") / "data" / "confirmation")[:NUM_ROWS]
        samples = [row["input_ids"] for row in rows]
        divergence, agreement, count = _compare(_logits(final, samples, told), _logits(scratch, samples, told))
        if not divergence <= MOST_DIVERGENCE:
            raise StageError(
                "export",
                f"the {form} model diverges by {divergence:.2g} nats a token from the final one, more than "
                f"{MOST_DIVERGENCE:g}",
                "serve the final folder as it is, and report this with the run's results.json",
            )
        publish_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    is_plain = form == "merged" and not checkpoint_config(target).is_heterogeneous
    return Exported(target, is_plain, divergence, agreement, count)


def _write_merged(final: Path, folder: Path, told: OnLoading) -> None:
    """Every layer dense, ``W + alpha / rank * B A`` in the model's own dtype."""
    import torch
    from safetensors.torch import load_file
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from qpruner.quantization.mixed import unpack

    config = checkpoint_config(final)
    dtype = config.dtype
    quantized = config.__dict__.pop("quantization_config", {"bits": {}})
    state = dense_tensors(final, lambda name: not name.startswith("base_model."))  # the adapter lies beside the weights
    for path in quantized["bits"]:
        names = [name for name in state if name.startswith(f"{path}.") and name != f"{path}.bias"]
        packed = {name.removeprefix(f"{path}."): state.pop(name) for name in names}
        state[f"{path}.weight"] = unpack(packed, torch.float32)
    settings = json.loads((final / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    adapter = load_file(final / ADAPTER_FILES[1])
    for done, (name, lora_a) in enumerate(adapter.items(), 1):
        if name.endswith(".lora_A.weight"):
            lora_b = adapter[name.replace(".lora_A.", ".lora_B.")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            added = settings["lora_alpha"] / settings["r"] * (lora_b.float() @ lora_a.float())
            state[weight] = (state[weight].float() + added).to(dtype)
        told("merging the adapter", done, len(adapter))
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    save_checkpoint(model, load_tokenizer(str(final)), folder, told)


def _write_peft(final: Path, folder: Path, target: Path) -> None:
    """The adapter where `PeftModel.from_pretrained` looks for it, the quantized model in a folder below."""
    shutil.copytree(final, folder / PEFT_BASE, ignore=shutil.ignore_patterns(*ADAPTER_FILES, "README.md"))
    settings = json.loads((final / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str((target / PEFT_BASE).resolve())
    (folder / ADAPTER_FILES[0]).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copy2(final / ADAPTER_FILES[1], folder)
    load_tokenizer(str(final)).save_pretrained(folder)


def _logits(folder: Path, samples: Sequence[Sequence[int]], told: OnLoading) -> list[torch.Tensor]:
    """Log-probabilities ``(tokens, vocabulary)`` of each sample."""
    import torch

    model = load(folder, told).eval()
    found = []
    with torch.no_grad():
        for sample in samples:
            logits = model(torch.tensor([sample], device=device())).logits[0]
            found.append(logits.float().log_softmax(-1).cpu())
            told("comparing predictions", len(found), len(samples))
    return found


def _compare(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> tuple[float, float, int]:
    """Mean divergence in nats, share of equal predictions, positions."""
    import torch

    ours, theirs = torch.cat(list(expected)), torch.cat(list(found))
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return float(divergence), float(agreement), len(ours)
