"""Assemble the model of a plan (a bit-width for every group of layers), and add LoRA adapters.

This module quantizes no weight: packed weights come from the bank, unquantized weights from the checkpoint.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qpruner.config.schema import LoraConfig
from qpruner.models import cpu, ragged
from qpruner.models.checkpoint import read_tensors
from qpruner.models.families import family_of
from qpruner.models.layout import group_linears
from qpruner.models.loading import device
from qpruner.plans.plan import FULL_BITS
from qpruner.quantization.bank import INDEX, BankIndex, read_plan
from qpruner.quantization.mixed import MixedPrecisionConfig, dense_layer, layer_tensors, packed_layer
from qpruner.runs.storage import OnPiece, read_json

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"
"""Name that peft gives to a model's only adapter."""


def assemble(
    checkpoint: Path,
    bank: Path,
    grouping: str,
    bits_by_group: Mapping[str, int],
    dtype: str,
    double_quant: bool,
    on_piece: OnPiece = lambda: None,
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Build the model of the plan `bits_by_group`, where `grouping` (`quantize.group`) defines the groups.

    Also return the initial adapters: `<layer>.lora_A` ``(rank, columns)`` and `<layer>.lora_B` ``(rows, rank)``.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(checkpoint)
    ragged.install(family_of(config))
    cpu.install()
    bits = {path: bits_by_group[name] for name, paths in group_linears(config, grouping).items() for path in paths}
    starts, packed = _split(read_plan(bank, bits_by_group, on_piece))
    quantized = {f"{path}.weight" for path, width in bits.items() if width != FULL_BITS}
    state = read_tensors(checkpoint, lambda name: name not in quantized, on_piece) | packed
    if quantized:
        config.quantization_config = MixedPrecisionConfig(bits, double_quant).to_dict()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=getattr(torch, dtype)
    )
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return _placed(model), starts


def _split(banked: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split tensors of a bank into initial adapter values and packed weights."""
    starts = {name: tensor for name, tensor in banked.items() if name.endswith((".lora_A", ".lora_B"))}
    return starts, {name: tensor for name, tensor in banked.items() if name not in starts}


def attach_adapters(
    model: PreTrainedModel, starts: Mapping[str, torch.Tensor], lora: LoraConfig, grouping: str, seed: int
) -> PeftModel:
    """Add a LoRA adapter to every layer that a plan gives a bit-width, 16 included, and set its initial values.

    A layer without values in `starts` gets a random ``A`` and a zero ``B``. With `lora.init: loftq` each row of the
    random ``A`` is scaled to length 1, as LoftQ does, so that unquantized layers learn as fast as quantized layers.
    """
    from peft import get_peft_model

    paths = [path for paths in group_linears(model.config, grouping).values() for path in paths]
    peft_model: PeftModel = get_peft_model(model, _peft_config(lora, {path.rpartition(".")[2] for path in paths}))
    _set_adapters(peft_model, starts, lora, paths, seed)
    return peft_model


def _peft_config(lora: LoraConfig, modules: Iterable[str]) -> PeftConfig:
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(modules),
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def _set_adapters(
    peft_model: PeftModel, starts: Mapping[str, torch.Tensor], lora: LoraConfig, paths: Sequence[str], seed: int
) -> None:
    model = peft_model.get_base_model()
    for path in paths:
        layer: Any = model.get_submodule(path)
        lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        lora_a.grad = lora_b.grad = None
        if f"{path}.lora_A" in starts:
            lora_a.copy_(starts[f"{path}.lora_A"])
            lora_b.copy_(starts[f"{path}.lora_B"])
            continue
        # Each layer has its own generator, so that its initial values do not depend on the bits of other layers.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
        random_a = torch.nn.init.kaiming_uniform_(torch.empty(lora_a.shape), a=math.sqrt(5), generator=generator)
        lora_a.copy_(random_a / random_a.norm(dim=1, keepdim=True) if lora.init == "loftq" else random_a)
        lora_b.zero_()
    torch.manual_seed(seed)


class PlanAssembler:
    """Assemble one plan after another in one process, replacing only the groups whose bits change.

    Every plan resets all adapters and the random state, so it gives the same model as in a fresh process.
    """

    def __init__(
        self, checkpoint: Path, bank: Path, grouping: str, dtype: str, double_quant: bool, lora: LoraConfig
    ) -> None:
        self._checkpoint, self._bank, self._grouping = checkpoint, bank, grouping
        self._dtype, self._double_quant, self._lora = dtype, double_quant, lora
        self._peft_model: PeftModel | None = None
        self._plan: dict[str, int] = {}
        self._starts: dict[str, torch.Tensor] = {}

    def model(self, plan: Mapping[str, int], seed: int, on_piece: OnPiece = lambda: None) -> PeftModel:
        """Assemble the model of a plan (group -> bits); do not use the model that an earlier call returned."""
        # Forget the model first: if replacing its groups fails half way, the next plan is assembled from scratch.
        current, self._peft_model = self._peft_model, None
        if current is None:
            model, self._starts = assemble(
                self._checkpoint, self._bank, self._grouping, plan, self._dtype, self._double_quant, on_piece
            )
            current = attach_adapters(model, self._starts, self._lora, self._grouping, seed)
        else:
            self._exchange(current, plan, seed, on_piece)
        self._plan, self._peft_model = dict(plan), current
        return current

    def _exchange(self, current: PeftModel, plan: Mapping[str, int], seed: int, on_piece: OnPiece) -> None:
        model = current.get_base_model()
        model.disable_input_require_grads()
        current.enable_adapter_layers()  # an evaluation may have disabled them
        # As in MixedPrecisionQuantizer: a model that was first assembled unquantized lacks these flags.
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
        paths = group_linears(model.config, self._grouping)
        changed = {name: bits for name, bits in plan.items() if bits != self._plan[name]}
        starts, packed = _split(read_plan(self._bank, changed, on_piece))
        bits_of = {path: bits for name, bits in changed.items() for path in paths[name]}
        unquantized = {f"{path}.weight" for path, bits in bits_of.items() if bits == FULL_BITS}
        dense = read_tensors(self._checkpoint, unquantized.__contains__, on_piece) if unquantized else {}
        same = {name: start for name, start in self._starts.items() if name.rpartition(".")[0] not in bits_of}
        self._starts = same | starts
        dtype = getattr(torch, self._dtype)
        layers: dict[str, torch.nn.Module] = {}
        for path, bits in bits_of.items():
            adapted: Any = model.get_submodule(path)
            old = adapted.get_base_layer()
            if bits == FULL_BITS:
                layers[path] = dense_layer(old, dense[f"{path}.weight"].to(dtype))
            else:
                layers[path] = packed_layer(old, bits, layer_tensors(packed, path), dtype, self._double_quant)
        for path, layer in _with_adapters(layers, self._lora).items():
            model.set_submodule(path, layer)
        _set_adapters(current, self._starts, self._lora, [path for each in paths.values() for path in each], seed)


def _with_adapters(layers: Mapping[str, torch.nn.Module], lora: LoraConfig) -> dict[str, torch.nn.Module]:
    """Wrap each layer in the LoRA layer that peft has for its type, as `get_peft_model` does."""
    from peft import inject_adapter_in_model

    holder = torch.nn.Module()
    holder.is_loaded_in_4bit = holder.is_loaded_in_8bit = True  # type: ignore[assignment]
    names = {path: f"layer_{position}" for position, path in enumerate(layers)}
    for path, layer in layers.items():
        holder.add_module(names[path], layer)
    if layers:
        inject_adapter_in_model(_peft_config(lora, names.values()), holder, ADAPTER)
    found: dict[str, Any] = {path: holder.get_submodule(name) for path, name in names.items()}
    for adapted in found.values():
        # As in get_peft_model: adapters are trained in float32.
        adapted.lora_A.float()
        adapted.lora_B.float()
    return found


def plan_assembler(
    checkpoint: Path, bank: Path, grouping: str, dtype: str, double_quant: bool, lora: LoraConfig
) -> PlanAssembler:
    """Return an assembler for a model and a bank; it is cached, so that a worker loads the model only once."""
    index = read_json(bank / INDEX, BankIndex)
    return _kept_assembler(index and index.digest, checkpoint, bank, grouping, dtype, double_quant, lora)


@functools.lru_cache(maxsize=1)
def _kept_assembler(digest: str | None, *settings: Any) -> PlanAssembler:
    return PlanAssembler(*settings)


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the device or, outside distributed training, spread it over all GPUs that this process sees.

    Ray shows a trial only its own GPUs. A process of a distributed training sees all, but uses torch's current one.
    """
    if torch.cuda.device_count() < 2 or torch.distributed.is_initialized():
        return model.to(device())
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    no_split: Any = model._no_split_modules
    memory = get_balanced_memory(model, no_split_module_classes=no_split)
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=no_split)
    placed: PreTrainedModel = dispatch_model(model, device_map)
    return placed


def cast_adapters(model: torch.nn.Module) -> None:
    """Convert a model's adapters to the type of its other weights, in which they are saved and served."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.dtype)


def measured_bytes(model: torch.nn.Module) -> int:
    """Count the bytes of all tensors of a model as they are packed, adapters included; a shared tensor counts once.

    bitsandbytes also stores a JSON blob per 4-bit layer and a format byte per 8-bit layer, which are not counted.
    """
    sizes = {
        tensor.data_ptr(): tensor.nbytes
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and ".quant_state." not in name and not name.endswith("weight_format")
    }
    return sum(sizes.values())
