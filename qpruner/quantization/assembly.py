"""Assemble the model of a plan (a format for every group of layers), and make it trainable.

Packed weights come from the bank, unpacked weights from the checkpoint.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from qpruner.config.schema import LoraConfig
from qpruner.models import cpu, ragged
from qpruner.models.checkpoint import read_tensors
from qpruner.models.families import family_of
from qpruner.models.layout import group_linears, group_paths, table_paths
from qpruner.models.loading import device
from qpruner.plans.plan import HEAD
from qpruner.quantization import scales
from qpruner.quantization.bank import BankSource, read_plan
from qpruner.quantization.formats import formats, trained_by
from qpruner.quantization.mixed import MixedPrecisionConfig, flag_for_peft
from qpruner.quantization.tuned import TunedPlan
from qpruner.runs.storage import OnPiece, fetch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"  # name that peft gives to a model's only adapter


def assemble(
    bank: BankSource,
    formats_by_group: Mapping[str, str],
    on_piece: OnPiece = lambda: None,
    tuned: TunedPlan | None = None,
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Build the model of a plan, and make the bank entries that it lacks.

    Embeddings and head stay unpacked if the plan does not name them.

    Args:
        bank: Where packed weights and the checkpoint are.
        formats_by_group: The plan, which maps each group to the name of its format.
        on_piece: Called after each piece of work, to show that the process is alive.
        tuned: The tuned rounding of this plan, which goes before the entries. Its layers get no
            initial adapters: those of an entry make up for the errors of other codes.

    Returns:
        The model, and its initial adapters: ``<layer>.lora_A`` ``(rank, columns)`` and
        ``<layer>.lora_B`` ``(rows, rank)``.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    checkpoint = fetch(bank.checkpoint, on_piece)
    config = AutoConfig.from_pretrained(checkpoint)
    family = family_of(config)
    ragged.install(family)
    cpu.install()
    paths = group_paths(config, bank.grouping)
    formats = {path: name for group, name in formats_by_group.items() for path in paths[group]}
    quantization = MixedPrecisionConfig(formats)
    packed_paths = quantization.formats

    packed: dict[str, torch.Tensor] = {}
    starts: dict[str, torch.Tensor] = {}
    for name, tensor in read_plan(bank, formats_by_group, on_piece).items():
        is_adapter = name.endswith((".lora_A", ".lora_B"))
        (starts if is_adapter else packed)[name] = tensor
    if tuned:
        of_blocks = tuned.read(config, on_piece)
        packed |= of_blocks
        layers = {name.removesuffix(".weight") for name in of_blocks}
        starts = {name: at for name, at in starts.items() if name.rpartition(".")[0] not in layers}

    left_out = {f"{path}.weight" for path in packed_paths}
    if HEAD not in table_paths(config) and family.embeddings in packed_paths:
        left_out.add(f"{family.head}.weight")  # some checkpoints have it although it is tied
    state = read_tensors(checkpoint, lambda name: name not in left_out, on_piece) | packed

    if packed_paths:
        config.quantization_config = quantization.to_dict()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=getattr(torch, bank.dtype)
    )
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return _placed(model), starts


def plan_model(
    bank: BankSource,
    plan: Mapping[str, str],
    seed: int,
    on_piece: OnPiece = lambda: None,
    tuned: TunedPlan | None = None,
) -> PeftModel | PreTrainedModel:
    """Build the trainable model of a plan (group -> format).

    It has its initial adapters or, if scales are trained, those of its packed layers.
    """
    model, starts = assemble(bank, plan, on_piece, tuned)
    if trained_by(bank.method, plan.values()) == "scales":
        scales.make_trainable(model)
        torch.manual_seed(seed)
        return model
    return attach_adapters(model, starts, bank.lora, bank.grouping, seed)


@torch.no_grad()
def attach_adapters(
    model: PreTrainedModel,
    starts: Mapping[str, torch.Tensor],
    lora: LoraConfig,
    grouping: str,
    seed: int,
) -> PeftModel:
    """Add a LoRA adapter to every linear layer of the blocks and set its initial values.

    Packed and unpacked layers both get one. A layer without values in `starts` gets a random ``A``
    and a zero ``B``. With `lora.init: loftq` each row of the random ``A`` is scaled to length 1, as
    LoftQ does, so that unpacked layers learn as fast as packed layers.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    flag_for_peft(model)
    paths = [path for paths in group_linears(model.config, grouping).values() for path in paths]
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted({path.rpartition(".")[2] for path in paths}),
        task_type="CAUSAL_LM",
    )
    peft_model: PeftModel = get_peft_model(model, settings)
    for path in paths:
        layer: Any = model.get_submodule(path)
        lora_a = layer.lora_A[ADAPTER].weight
        lora_b = layer.lora_B[ADAPTER].weight
        if f"{path}.lora_A" in starts:
            lora_a.copy_(starts[f"{path}.lora_A"])
            lora_b.copy_(starts[f"{path}.lora_B"])
            continue
        # Each layer has its own generator, so that its initial values do not depend on the formats
        # of other layers.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
        random_a = torch.empty(lora_a.shape)
        torch.nn.init.kaiming_uniform_(random_a, a=math.sqrt(5), generator=generator)
        if lora.init == "loftq":
            random_a /= random_a.norm(dim=1, keepdim=True)
        lora_a.copy_(random_a)
        lora_b.zero_()
    torch.manual_seed(seed)
    return peft_model


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the device, or spread it over all GPUs that this process sees.

    Ray shows a trial only its own GPUs. A process of a distributed training sees all of them, but
    uses only torch's current one.
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
    """Convert adapters to the dtype of the unpacked weights, in which they are saved and served."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.config.dtype)


def measured_bytes(model: Any) -> int:
    """Count the bytes of all tensors of a model as they are saved; a shared tensor counts once.

    Adapters are trained in float32 and saved in the model's type. Changes of scales are saved in
    the packed weights.
    """
    uncounted = [name for number_format in formats().values() for name in number_format.uncounted]
    uncounted.append("scale_changes")
    endings = tuple(f".{name}" for name in uncounted)
    sizes: dict[int, int] = {}  # by address
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or name.endswith(endings):
            continue
        dtype = model.config.dtype if ".lora_" in name else tensor.dtype
        sizes[tensor.data_ptr()] = tensor.numel() * dtype.itemsize
    return sum(sizes.values())
