"""From a plan to a model that can be fine-tuned: dense tensors, packed tensors and adapters put together.

No weight is quantized here: a plan's groups come from the bank, everything else from the checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qpruner.config import LoraConfig
from qpruner.models import ragged
from qpruner.models.checkpoint import dense_tensors
from qpruner.models.layout import group_linears
from qpruner.models.loading import device
from qpruner.plan import FULL_BITS
from qpruner.quantization.bank import INDEX, read_index, read_plan
from qpruner.quantization.mixed import MixedPrecisionConfig, dense_layer, packed_layer

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
    state = dense_tensors(checkpoint, lambda name: name not in quantized) | packed
    if quantized:
        config.quantization_config = MixedPrecisionConfig(bits, double_quant).to_dict()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=getattr(torch, dtype)
    )
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return _placed(model), starts


def attach_adapters(
    model: PreTrainedModel, starts: Mapping[str, torch.Tensor], lora: LoraConfig, group: str, seed: int
) -> PeftModel:
    """Put a LoRA adapter on every grouped layer; layers without a LoftQ start begin at zero.

    With `lora.init: loftq` their rows of ``A`` get the length that LoftQ's have, so that unquantized layers learn as
    fast as quantized ones.

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
        for path in paths if lora.init == "loftq" else ():
            lora_a = cast(Any, peft_model.base_model.model.get_submodule(path)).lora_A["default"].weight
            lora_a.div_(lora_a.norm(dim=1, keepdim=True))
        for name, start in starts.items():
            path, _, matrix = name.rpartition(".")
            layer = peft_model.base_model.model.get_submodule(path)
            getattr(layer, matrix)["default"].weight.copy_(start)
    return peft_model


class Workbench:
    """The model of one plan after the other: between two plans only the groups whose bits differ are exchanged.

    Adapters are made anew for every plan, and the random state is set, so that a plan gives the same model as in a
    fresh process.

    Args:
        checkpoint: Folder of the dense model.
        bank: Folder of the bank.
        group: How layers are grouped.
        dtype: Name of the torch dtype of what stays unquantized.
        double_quant: Whether the bank's 4-bit scales are quantized.
    """

    def __init__(self, checkpoint: Path, bank: Path, group: str, dtype: str, double_quant: bool) -> None:
        self._checkpoint, self._bank, self._group = checkpoint, bank, group
        self._dtype, self._double_quant = dtype, double_quant
        self._peft_model: PeftModel | None = None
        self._plan: dict[str, int] = {}

    def model(self, plan: Mapping[str, int], lora: LoraConfig, seed: int) -> PeftModel:
        """The model of a plan with fresh adapters; the one handed out before must not be used any more.

        Args:
            plan: Bits by group.
            lora: The adapters.
            seed: Seeds the plain starts.
        """
        # Dropped first: an exchange that fails half way must not be gone on from.
        held, self._peft_model = self._peft_model, None
        if held is None:
            model, starts = assemble(self._checkpoint, self._bank, self._group, plan, self._dtype, self._double_quant)
        else:
            model, starts = self._exchange(held.unload(), plan)
        self._plan = dict(plan)
        self._peft_model = attach_adapters(model, starts, lora, self._group, seed)
        return self._peft_model

    def _exchange(
        self, model: PreTrainedModel, plan: Mapping[str, int]
    ) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        model.disable_input_require_grads()
        # As in MixedPrecisionQuantizer: a model that began unquantized has not told peft of its new layers.
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # type: ignore[assignment]
        paths = group_linears(model.config, self._group)
        different = {name for name, bits in plan.items() if bits != self._plan[name]}
        banked = read_plan(self._bank, plan)
        starts = {name: tensor for name, tensor in banked.items() if name.endswith((".lora_A", ".lora_B"))}
        unquantized = {path for name in different if plan[name] == FULL_BITS for path in paths[name]}
        weights = {f"{path}.weight" for path in unquantized}
        dense = dense_tensors(self._checkpoint, weights.__contains__) if weights else {}
        dtype = getattr(torch, self._dtype)
        for name in different:
            for path in paths[name]:
                old = cast(torch.nn.Linear, model.get_submodule(path))  # bitsandbytes' layers are subclasses
                if plan[name] == FULL_BITS:
                    new: torch.nn.Module = dense_layer(old, dense[f"{path}.weight"].to(dtype))
                else:
                    tensors = {
                        key.removeprefix(f"{path}."): tensor
                        for key, tensor in banked.items()
                        if key.startswith(f"{path}.") and key not in starts
                    }
                    new = packed_layer(old, plan[name], tensors, dtype, self._double_quant)
                model.set_submodule(path, new)
        return model, starts


def workbench(checkpoint: Path, bank: Path, group: str, dtype: str, double_quant: bool) -> Workbench:
    """This process's workbench for a model and a bank: kept from call to call, so that a worker loads a model once."""
    digest = read_index(bank).digest if (bank / INDEX).is_file() else ""
    return _held(checkpoint, bank, group, dtype, double_quant, digest)


@functools.lru_cache(maxsize=1)
def _held(checkpoint: Path, bank: Path, group: str, dtype: str, double_quant: bool, digest: str) -> Workbench:
    return Workbench(checkpoint, bank, group, dtype, double_quant)


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    """On the one device, or spread over the GPUs where this process sees several: Ray shows a trial its own."""
    if torch.cuda.device_count() < 2:
        return model.to(device())
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole: Any = model._no_split_modules
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    placed: PreTrainedModel = dispatch_model(
        model, infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    )
    return placed


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
