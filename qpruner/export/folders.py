"""The final model in forms that other tools load: dense with the adapter merged in, or as peft knows it.

An export is written aside, loaded again and compared with the final model before it gets its name: every layer with an
adapter on its own, for which rounding is small beside what could be lost, and the predictions, for all the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qpruner.data.encoding import load_encoded
from qpruner.errors import StageError, UserError
from qpruner.hf import load
from qpruner.models.checkpoint import dense_tensors, save_checkpoint
from qpruner.models.loading import OnLoading, checkpoint_config, device, ignore_progress, load_tokenizer
from qpruner.models.memory import raising_out_of_memory
from qpruner.models.snippets import PEFT_BASE
from qpruner.runs.records import MARK, ExportRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import exists, fetch, publish_folder, retry_storage, write_json

if TYPE_CHECKING:
    import torch

Form = Literal["merged", "peft"]
AGAINST_SHORTAGE = (
    "end what else takes memory, or repeat the command on a machine that has more; where a GPU's memory ran out, set "
    "`CUDA_VISIBLE_DEVICES=` to use the machine's"
)
PEFT_PREFIX = "base_model.model."
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
NUM_ROWS = 8
NUM_PROBES = 64
MOST_ERROR = 0.05
"""Share of a layer's answer that an export's may be off. Rounding takes 0.003 at 4 bits and, as inputs are rounded to 8
bits, too, 0.009 at 8 (the demo's 210 layers, 2026-11); weights that are decoded wrongly are off by what 4 bits cost,
0.09, or more."""
LEAST_ADAPTER = 2.0**-9
"""Share of a layer's answer below which bfloat16, which rounds by as much, need not show its adapter."""
MOST_DIVERGENCE = 0.05
"""Nats a token that an export may diverge: three times what rounding takes (0.016 for the demo's merged model), a
quarter of what it does without any adapter (0.20). It is for embeddings, norms and head. One lost adapter does not show
in it: of five tried in the demo one gave 0.027, the others 0.016 to 0.017. So layers are compared one by one, too."""


@dataclass(frozen=True)
class Likeness:
    """How near an export is to the final model.

    Attributes:
        divergence: Mean Kullback-Leibler divergence from the final model's next-token distribution, in nats.
        agreement: Share of positions at which both predict the same token.
        num_positions: Positions compared.
    """

    divergence: float
    agreement: float
    num_positions: int


@dataclass(frozen=True)
class Exported(Likeness):
    """What was written.

    Attributes:
        folder: Where it is.
        is_plain: Whether it loads without `import qpruner.hf`.
    """

    folder: Path
    is_plain: bool


@raising_out_of_memory(AGAINST_SHORTAGE)
def export(run: RunDir, form: Form, target: Path, told: OnLoading = ignore_progress) -> Exported:
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
        StorageError: If there is no room for it on the disk.
        OutOfMemory: If there is none in memory.
    """
    final = run.root / "final"
    if not exists(final / ADAPTER_FILES[0]):
        raise UserError(f"{run.place} has no final model: repeat `qpruner run` until it has fine-tuned one")
    if target.exists():
        raise UserError(f"{target} exists: delete it or name another folder with `--out`")
    record = ExportRecord(final=run.final_digests())
    final = fetch(final)
    scratch = target.with_name(f".{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        _write_merged(final, scratch, told) if form == "merged" else _write_peft(final, scratch, target)
        rows = load_encoded(run.stage("prepare") / "data" / "confirmation")[:NUM_ROWS]
        samples = [row["input_ids"] for row in rows]
        likeness = compare(final, scratch, samples, told)
        write_json(scratch / MARK, record)
        publish_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    is_plain = form == "merged" and not checkpoint_config(target).is_heterogeneous
    return Exported(**vars(likeness), folder=target, is_plain=is_plain)


def _write_merged(final: Path, folder: Path, told: OnLoading) -> None:
    """Every layer dense, ``W + alpha / rank * B A`` in the model's own dtype."""
    import torch
    from safetensors.torch import load_file
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from qpruner.quantization.mixed import unpack

    config = checkpoint_config(final)
    dtype = config.dtype
    quantized = config.__dict__.pop("quantization_config", {"bits": {}})
    state = dense_tensors(final, lambda name: not name.startswith(PEFT_PREFIX))  # the adapter lies beside the weights
    for path in quantized["bits"]:
        names = [name for name in state if name.startswith(f"{path}.") and name != f"{path}.bias"]
        packed = {name.removeprefix(f"{path}."): state.pop(name) for name in names}
        state[f"{path}.weight"] = unpack(packed, torch.float32)
    settings = json.loads((final / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    adapter = load_file(final / ADAPTER_FILES[1])
    for done, (name, lora_a) in enumerate(adapter.items(), 1):
        if name.endswith(".lora_A.weight"):
            lora_b = adapter[name.replace(".lora_A.", ".lora_B.")]
            weight = name.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".")
            added = settings["lora_alpha"] / settings["r"] * (lora_b.float() @ lora_a.float())
            state[weight] = (state[weight].float() + added).to(dtype)
        told("merging the adapter", done, len(adapter))
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    save_checkpoint(model, load_tokenizer(str(final)), folder, told)


def _write_peft(final: Path, folder: Path, target: Path) -> None:
    """The adapter where `PeftModel.from_pretrained` looks for it, the quantized model in a folder below."""
    left_out = shutil.ignore_patterns(*ADAPTER_FILES, "README.md")
    settings = json.loads((final / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str((target / PEFT_BASE).resolve())
    tokenizer = load_tokenizer(str(final))

    def write() -> None:
        shutil.copytree(final, folder / PEFT_BASE, ignore=left_out, dirs_exist_ok=True)
        (folder / ADAPTER_FILES[0]).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        shutil.copy2(final / ADAPTER_FILES[1], folder)
        tokenizer.save_pretrained(folder)

    retry_storage(write, target)


def compare(
    final: Path, exported: Path, samples: Sequence[Sequence[int]], told: OnLoading = ignore_progress
) -> Likeness:
    """Whether an export is the final model. They are loaded one after the other.

    Args:
        final: Its folder.
        exported: That of the export.
        samples: Token ids to compare predictions on.
        told: Told how far it is.

    Raises:
        StageError: If a layer has lost its adapter or answers otherwise, or the predictions differ.
    """
    from peft.tuners.lora import LoraLayer

    model = load(final, told).eval()
    dtype = model.dtype
    adapted = {path: layer for path, layer in _layers(model).items() if isinstance(layer, LoraLayer)}
    added = {path: _added(layer) for path, layer in adapted.items()}
    answers = {path: _answer(layer.base_layer, dtype) + added[path] for path, layer in adapted.items()}
    expected = _log_probabilities(model, samples, told)
    del model, adapted
    model = load(exported, told).eval()
    layers = _layers(model)
    for path, answer in answers.items():
        if damage := _damage(answer, added[path], _answer(layers[path], dtype)):
            raise _unlike(f"the exported `{path}` {damage}")
    found = _log_probabilities(model, samples, told)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    if not divergence <= MOST_DIVERGENCE:
        raise _unlike(f"the export diverges by {divergence:.2g} nats a token, more than {MOST_DIVERGENCE:g}")
    agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return Likeness(divergence, float(agreement), len(expected))


def _unlike(how: str) -> StageError:
    remedy = "serve the final folder as it is, and report this with the run's results.json"
    return StageError("export", f"what was written is not the final model: {how}", remedy)


def _layers(model: Any) -> dict[str, Any]:
    """Every layer by its path in the model below the adapters."""
    return {path.removeprefix(PEFT_PREFIX): layer for path, layer in model.named_modules()}


def _probes(layer: Any) -> torch.Tensor:
    """Random inputs ``(NUM_PROBES, in)``, the same for each layer of that size."""
    import torch

    return torch.randn(NUM_PROBES, layer.in_features, generator=torch.Generator().manual_seed(0))


def _answer(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """What a layer makes of its probes, ``(NUM_PROBES, out)``."""
    import torch

    with torch.no_grad():
        answer: torch.Tensor = layer(_probes(layer).to(device(), dtype))
    return answer.float().cpu()


def _added(layer: Any) -> torch.Tensor:
    """What the adapter has in that, exactly."""
    (adapter,) = layer.active_adapters
    weight: torch.Tensor = layer.get_delta_weight(adapter)
    return _probes(layer) @ weight.detach().float().cpu().T


def _damage(expected: torch.Tensor, added: torch.Tensor, found: torch.Tensor) -> str | None:
    """What is wrong with a layer that answers `found`, if anything.

    How much of the adapter is there is a projection, which rounding hardly touches, for it knows nothing of adapters.
    """
    error = found - expected
    off = float(error.norm() / expected.norm())
    if not off <= MOST_ERROR:
        return f"answers {off:.0%} off"
    if added.norm() > LEAST_ADAPTER * expected.norm():
        there = 1 + float((error * added).sum() / added.square().sum())
        if abs(there - 1) > 0.5:
            return f"has {there:.0%} of its adapter"
    return None


def _log_probabilities(model: Any, samples: Sequence[Sequence[int]], told: OnLoading) -> torch.Tensor:
    """``(tokens, vocabulary)`` of all samples, one after the other."""
    import torch

    found = []
    with torch.no_grad():
        for sample in samples:
            logits = model(torch.tensor([sample], device=device())).logits[0]
            found.append(logits.float().log_softmax(-1).cpu())
            told("comparing predictions", len(found), len(samples))
    return torch.cat(found)
