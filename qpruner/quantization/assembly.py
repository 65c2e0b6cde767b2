"""Assemble the model of a plan (a format for every group of layers), and add LoRA adapters.

Packed weights come from the bank, unpacked weights from the checkpoint.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qpruner.config.schema import LoraConfig
from qpruner.models import cpu, ragged
from qpruner.models.checkpoint import read_tensors
from qpruner.models.families import family_of
from qpruner.models.layout import group_linears, group_paths, table_paths
from qpruner.models.loading import device
from qpruner.models.memory import release
from qpruner.plans.plan import HEAD
from qpruner.quantization.bank import BankSource, read_plan
from qpruner.quantization.formats import DENSE, format_of, formats
from qpruner.quantization.mixed import MixedPrecisionConfig, dense_layer, flag_for_peft, layer_tensors, packed_layer
from qpruner.runs.storage import OnPiece, fetch

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"  # name that peft gives to a model's only adapter


def assemble(
    bank: BankSource, formats_by_group: Mapping[str, str], on_piece: OnPiece = lambda: None
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Build the model of the plan `formats_by_group`; make the entries that the bank lacks.

    Embeddings and head are unpacked if the plan does not name them. Also return the initial adapters:
    `<layer>.lora_A` ``(rank, columns)`` and `<layer>.lora_B` ``(rows, rank)``.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    checkpoint = fetch(bank.checkpoint, on_piece)
    config = AutoConfig.from_pretrained(checkpoint)
    ragged.install(family_of(config))
    cpu.install()
    paths = group_paths(config, bank.grouping)
    formats = {path: name for group, name in formats_by_group.items() for path in paths[group]}
    packed_paths = {path for path, name in formats.items() if format_of(name).is_packed}
    starts, packed = _split(read_plan(bank, formats_by_group, on_piece))
    left_out = {f"{path}.weight" for path in packed_paths}
    if _is_tied(config) and family_of(config).embeddings in packed_paths:
        left_out.add(f"{family_of(config).head}.weight")  # some checkpoints have it although it is tied
    state = read_tensors(checkpoint, lambda name: name not in left_out, on_piece) | packed
    if packed_paths:
        config.quantization_config = MixedPrecisionConfig(formats).to_dict()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=getattr(torch, bank.dtype)
    )
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return _placed(model), starts


def _is_tied(config: Any) -> bool:
    return HEAD not in table_paths(config)


def _split(banked: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split tensors of a bank into initial adapter values and packed weights."""
    starts = {name: tensor for name, tensor in banked.items() if name.endswith((".lora_A", ".lora_B"))}
    return starts, {name: tensor for name, tensor in banked.items() if name not in starts}


def attach_adapters(
    model: PreTrainedModel, starts: Mapping[str, torch.Tensor], lora: LoraConfig, grouping: str, seed: int
) -> PeftModel:
    """Add a LoRA adapter to every linear layer of the groups in blocks, packed or not, and set its initial values.

    A layer without values in `starts` gets a random ``A`` and a zero ``B``. With `lora.init: loftq` each row of the
    random ``A`` is scaled to length 1, as LoftQ does, so that unpacked layers learn as fast as packed layers.
    """
    from peft import get_peft_model

    flag_for_peft(model)
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
        for each in (layer.lora_A, layer.lora_B):
            each.float()  # an evaluation may have cast them
        lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        lora_a.grad = lora_b.grad = None
        if f"{path}.lora_A" in starts:
            lora_a.copy_(starts[f"{path}.lora_A"])
            lora_b.copy_(starts[f"{path}.lora_B"])
            continue
        # Each layer has its own generator, so that its initial values do not depend on the formats of other layers.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
        random_a = torch.nn.init.kaiming_uniform_(torch.empty(lora_a.shape), a=math.sqrt(5), generator=generator)
        lora_a.copy_(random_a / random_a.norm(dim=1, keepdim=True) if lora.init == "loftq" else random_a)
        lora_b.zero_()
    torch.manual_seed(seed)


class PlanAssembler:
    """Assemble one plan after another in one process, replacing only the groups whose formats change.

    Every plan resets all adapters and the random state, so it gives the same model as in a fresh process.
    """

    def __init__(self, bank: BankSource) -> None:
        self.bank = bank
        self._peft_model: PeftModel | None = None
        self._plan: dict[str, str] = {}
        self._starts: dict[str, torch.Tensor] = {}

    def model(self, plan: Mapping[str, str], seed: int, on_piece: OnPiece = lambda: None) -> PeftModel:
        """Assemble the model of a plan (group -> format); do not use the model that an earlier call returned."""
        # Forget the model first: if replacing its groups fails half way, the next plan is assembled from scratch.
        current, self._peft_model = self._peft_model, None
        if current is None:
            model, self._starts = assemble(self.bank, plan, on_piece)
            current = attach_adapters(model, self._starts, self.bank.lora, self.bank.grouping, seed)
        else:
            self._exchange(current, plan, seed, on_piece)
        self._plan, self._peft_model = dict(plan), current
        return current

    def _exchange(self, current: PeftModel, plan: Mapping[str, str], seed: int, on_piece: OnPiece) -> None:
        model = current.get_base_model()
        model.disable_input_require_grads()
        current.enable_adapter_layers()  # an evaluation may have disabled them
        grouping = self.bank.grouping
        paths, blocks = group_paths(model.config, grouping), group_linears(model.config, grouping)
        whole = dict.fromkeys(paths, DENSE) | dict(plan)
        changed = {name: each for name, each in whole.items() if each != self._plan.get(name, DENSE)}
        starts, packed = _split(read_plan(self.bank, changed, on_piece))
        changed_paths = {path for name in changed for path in paths[name]}
        same = {name: start for name, start in self._starts.items() if name.rpartition(".")[0] not in changed_paths}
        self._starts = same | starts
        wanted = {path: each for name, each in changed.items() for path in paths[name]}
        layers = self._layers(model, wanted, packed, on_piece)
        adapted = {path: layers.pop(path) for name in changed.keys() & blocks.keys() for path in paths[name]}
        for path, layer in _with_adapters(adapted, self.bank.lora).items():
            model.set_submodule(path, layer)
        for path, layer in layers.items():
            _replace_table(model, path, layer)
        in_blocks = [path for each in blocks.values() for path in each]
        _set_adapters(current, self._starts, self.bank.lora, in_blocks, seed)

    def _layers(
        self, model: Any, formats: Mapping[str, str], packed: Mapping[str, torch.Tensor], on_piece: OnPiece
    ) -> dict[str, torch.nn.Module]:
        """Build the layers at some paths anew, from packed tensors or from the checkpoint."""
        unpacked = {f"{path}.weight" for path, name in formats.items() if not format_of(name).is_packed}
        dense = read_tensors(self.bank.checkpoint, unpacked.__contains__, on_piece) if unpacked else {}
        dtype = getattr(torch, self.bank.dtype)
        layers: dict[str, torch.nn.Module] = {}
        for path, name in formats.items():
            old: Any = model.get_submodule(path)
            old = old.get_base_layer() if hasattr(old, "get_base_layer") else old
            if f"{path}.weight" in dense:
                layers[path] = dense_layer(old, dense[f"{path}.weight"].to(dtype))
            else:
                layers[path] = packed_layer(old, name, layer_tensors(packed, path), dtype)
            if path == family_of(model.config).embeddings and _is_tied(model.config):
                head = family_of(model.config).head
                layers[head] = _tied(model.get_submodule(head), name, layers[path], dtype)
        return layers


def _tied(head: torch.nn.Module, name: str, embeddings: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Build a head whose weight is that of new embeddings of some format."""
    weight = embeddings.get_parameter("weight")
    is_packed = format_of(name).is_packed
    layer = packed_layer(head, name, {"weight": weight}, dtype) if is_packed else dense_layer(head, weight)
    layer.weight = weight
    return layer


def _replace_table(model: PreTrainedModel, path: str, layer: torch.nn.Module) -> None:
    """Put new embeddings or a new head into a model, with the hook that moves inputs between GPUs."""
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)
    model.set_submodule(path, layer)


def _with_adapters(layers: Mapping[str, torch.nn.Module], lora: LoraConfig) -> dict[str, torch.nn.Module]:
    """Wrap each layer in the LoRA layer that peft has for its type, as `get_peft_model` does."""
    from peft import inject_adapter_in_model

    holder = torch.nn.Module()
    flag_for_peft(holder)
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


def plan_assembler(bank: BankSource) -> PlanAssembler:
    """Return an assembler for a bank; this process keeps one, so that a worker loads a cut's model only once."""
    if _kept and _kept[0].bank != bank:
        _kept.clear()
        release()
    if not _kept:
        _kept.append(PlanAssembler(bank))
    return _kept[0]


_kept: list[PlanAssembler] = []


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


def cast_adapters(model: Any) -> None:
    """Convert a model's adapters to the type of its unpacked weights, in which they are saved and served."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.config.dtype)


def measured_bytes(model: Any) -> int:
    """Count the bytes of all tensors of a model as they are saved; a shared tensor counts once.

    Adapters are trained in float32 and saved in the model's type.
    """
    sizes, uncounted = {}, tuple(f".{name}" for found in formats().values() for name in found.uncounted)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not name.endswith(uncounted):
            element_bytes = model.config.dtype.itemsize if ".lora_" in name else tensor.element_size()
            sizes[tensor.data_ptr()] = tensor.numel() * element_bytes
    return sum(sizes.values())
