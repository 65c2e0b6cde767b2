"""From a plan to a model that can be fine-tuned: dense tensors, packed tensors and adapters put together.

No weight is quantized here: a plan's groups come from the bank, everything else from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from qpruner.config import LoraConfig
from qpruner.errors import CorruptFile
from qpruner.models import ragged
from qpruner.models.layout import group_linears
from qpruner.models.loading import device
from qpruner.plan import FULL_BITS
from qpruner.quantization.bank import read_plan
from qpruner.quantization.mixed import MixedPrecisionConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def assemble(
    checkpoint: Path, bank: Path, group: str, bits_by_group: Mapping[str, int], dtype: str, double_quant: bool
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Build the model of a plan.

    Args:
        checkpoint: Folder of the dense model.
        bank: Folder of the bank; not read when every group is at 16 bits.
        group: How layers are grouped: `block`, `sublayer` or `projection`.
        bits_by_group: The plan.
        dtype: Name of the torch dtype of what stays unquantized.
        double_quant: Whether the bank's 4-bit scales are quantized.

    Returns:
        The model, and its adapter starts: `<layer>.lora_A` ``(rank, columns)`` and `<layer>.lora_B` ``(rows, rank)``.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    ragged.install()
    config = AutoConfig.from_pretrained(checkpoint)
    linears = group_linears(config, group)
    bits = {path: bits_by_group[name] for name, paths in linears.items() for path in paths}
    banked = read_plan(bank, bits_by_group)
    starts = {name: tensor for name, tensor in banked.items() if name.endswith((".lora_A", ".lora_B"))}
    packed = {name: tensor for name, tensor in banked.items() if name not in starts}
    quantized = {f"{path}.weight" for path, width in bits.items() if width != FULL_BITS}
    state = _dense_tensors(checkpoint, quantized) | packed
    if quantized:
        config.quantization_config = MixedPrecisionConfig(bits, double_quant).to_dict()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=getattr(torch, dtype)
    )
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model.to(device()), starts


def attach_adapters(
    model: PreTrainedModel, starts: Mapping[str, torch.Tensor], lora: LoraConfig, group: str, seed: int
) -> PeftModel:
    """Put a LoRA adapter on every grouped layer; layers without a LoftQ start begin at zero.

    Args:
        model: What `assemble` built.
        starts: The adapter starts.
        lora: Rank, scaling, dropout.
        group: How layers are grouped.
        seed: Seeds the plain starts.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    paths = [path for paths in group_linears(model.config, group).values() for path in paths]
    torch.manual_seed(seed)
    peft_model: PeftModel = get_peft_model(
        model,
        PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=sorted({path.rpartition(".")[2] for path in paths}),
            task_type="CAUSAL_LM",
        ),
    )
    with torch.no_grad():
        for name, start in starts.items():
            path, _, matrix = name.rpartition(".")
            layer = peft_model.base_model.model.get_submodule(path)
            getattr(layer, matrix)["default"].weight.copy_(start)
    return peft_model


def measured_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's tensors as they are packed: codes, scales, what is unquantized, adapters; shared ones once.

    bitsandbytes' small JSON blob beside each 4-bit layer and the format byte beside each 8-bit one are left out.
    """
    seen: set[int] = set()
    total = 0
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or ".quant_state." in name or name.endswith("weight_format"):
            continue
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.nbytes
    return total


def _dense_tensors(checkpoint: Path, leave_out: set[str]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors but for some, read shard by shard."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(shard, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys() if name not in leave_out}  # noqa: SIM118
        except SafetensorError as error:
            raise CorruptFile(
                f"weight file {shard} cannot be read: {error}; delete its folder to rebuild it", shard
            ) from error
    return tensors
