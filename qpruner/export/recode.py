"""Rewrite a final model in other formats, or with its adapter merged.

Every export starts from such a checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from qpruner.export.compare import PEFT_PREFIX
from qpruner.models.checkpoint import RENAMED, read_tensors
from qpruner.models.gguf_reader import read_gguf
from qpruner.models.layout import skeleton
from qpruner.models.loading import OnWork, checkpoint_config, device, ignore_progress
from qpruner.quantization.formats import DENSE, format_of
from qpruner.quantization.rounding import pack
from qpruner.runs.storage import retry_storage

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SHARD_BYTES = 10**9

GramOf = Callable[
    [str], torch.Tensor | None
]  # maps a layer to the Gram matrix of its inputs, if GPTQ rounds it
NewFormat = Callable[
    [str, int], str
]  # maps a packed layer's format and its columns to the format that it shall get


def dense(name: str, columns: int) -> str:
    """Unpack every layer: the `NewFormat` of merged models."""
    return DENSE


def recode(
    final: Path,
    folder: Path,
    new_format: NewFormat,
    merge: bool,
    on_progress: OnWork = ignore_progress,
    fixed: Mapping[str, str] | None = None,
    gram_of: GramOf = lambda path: None,
) -> dict[str, str]:
    """Write the model of a final folder with its packed layers in other formats.

    Layers that keep their format and are not merged keep their bytes.

    Args:
        final: The folder of the final model.
        folder: The folder to write.
        new_format: Maps a packed layer's format and its columns to its new format.
        merge: Add ``alpha / rank * B A`` to each weight in float32, which is then rounded once,
            to its format (where `gram_of` has a matrix, by GPTQ) or to the model's type. No
            adapter is written then.
        on_progress: Is called with the number of layers that are done.
        fixed: The formats of single layers, which go before `new_format`.
        gram_of: Maps a layer to the Gram matrix by which GPTQ rounds it, or None.

    Returns:
        The layers whose format changed, each with its new format.
    """
    config, changed = checkpoint_config(final), changes(final, new_format, fixed)
    old, widths = formats_of(config), columns_of(config)
    new, adapter = old | changed, _adapter(final) if merge else {}
    copy_other_files(final, folder, () if merge else ADAPTER_FILES)
    described = plain_description(final)
    if packed := {path: name for path, name in new.items() if format_of(name).is_packed}:
        settings = getattr(config, "quantization_config", None) or {"quant_method": "qpruner"}
        described["quantization_config"] = settings | {"formats": packed}
    text = json.dumps(described, indent=2) + "\n"
    retry_storage(lambda: (folder / "config.json").write_text(text, encoding="utf-8"), folder)
    state = read_tensors(final, lambda name: not name.startswith(PEFT_PREFIX))
    todo = [path for path in widths if path in changed or path in adapter]
    for done, path in enumerate(todo, 1):
        weight = format_of(old.get(path, DENSE)).unpack(
            take_weight(state, path), widths[path], torch.float32
        )
        if path in adapter:
            weight = weight + adapter[path]()
        found = format_of(new.get(path, DENSE))
        weight = weight.to(device()) if found.is_packed else weight.to(config.dtype)
        gram = gram_of(path) if getattr(found, "takes_gptq", False) else None
        tensors = pack(found, weight, gram) if found.is_packed else {"weight": weight}
        state |= {f"{path}.{name}": tensor.cpu() for name, tensor in tensors.items()}
        on_progress("merging the adapter" if merge else "packing layers", done, len(todo))
    if config.model_type == "gpt_neox":
        in_files, in_model = RENAMED
        state = {name.replace(in_model, in_files): tensor for name, tensor in state.items()}
    write_tensors(state, folder)
    return changed


def changes(
    final: Path, new_format: NewFormat, fixed: Mapping[str, str] | None = None
) -> dict[str, str]:
    """List the layers to which `recode` would give another format, each with its new format."""
    config = checkpoint_config(final)
    old, widths = formats_of(config), columns_of(config)
    wanted = {path: new_format(name, widths[path]) for path, name in old.items()} | dict(
        fixed or {}
    )
    return {path: name for path, name in wanted.items() if name != old.get(path, DENSE)}


def formats_of(config: Any) -> dict[str, str]:
    """Map the paths of packed layers to their formats, from the config of a checkpoint."""
    return dict((getattr(config, "quantization_config", None) or {"formats": {}})["formats"])


def columns_of(config: Any) -> dict[str, int]:
    """Map the paths of all layers to the columns of their weights."""
    parameters = skeleton(config).named_parameters()
    suffix = ".weight"
    return {
        name.removesuffix(suffix): each.shape[-1]
        for name, each in parameters
        if name.endswith(suffix)
    }


def take_weight(state: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Remove a layer's weight from the state; return its tensors by their names in the layer."""
    names = [name for name in state if name.startswith(f"{path}.weight")]
    return {name.removeprefix(f"{path}."): state.pop(name) for name in names}


def _adapter(final: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Map the paths of layers to functions that compute what the adapter adds to their weights."""
    settings = json.loads((final / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    tensors = read_tensors(final, lambda name: name.startswith(PEFT_PREFIX))
    scale, end = settings["lora_alpha"] / settings["r"], ".lora_A.weight"

    def added(path: str) -> torch.Tensor:
        lora_a, lora_b = (
            tensors[f"{PEFT_PREFIX}{path}.lora_{side}.weight"].float() for side in "AB"
        )
        product: torch.Tensor = scale * (lora_b @ lora_a)
        return product

    paths = [
        name.removeprefix(PEFT_PREFIX).removesuffix(end) for name in tensors if name.endswith(end)
    ]
    return {path: partial(added, path) for path in paths}


def plain_description(checkpoint: Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint without the description of its packed layers."""
    described: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    described.pop("quantization_config", None)
    return described


def copy_other_files(final: Path, folder: Path, also: Sequence[str] = ()) -> None:
    """Copy all but weights, card and config; of the adapter those named in `also`."""
    left_out = {*ADAPTER_FILES, "README.md", "config.json"} - {*also}
    ignored = shutil.ignore_patterns("model*.safetensors*", *left_out)
    retry_storage(
        lambda: shutil.copytree(final, folder, ignore=ignored, dirs_exist_ok=True), folder
    )


def copy_adapter(final: Path, folder: Path, base: Path) -> None:
    """Copy the adapter as peft loads it, with the path of its base model."""
    settings = json.loads((final / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    text = json.dumps(settings | {"base_model_name_or_path": str(base.resolve())}, indent=2) + "\n"

    def copy() -> None:
        folder.mkdir(exist_ok=True)
        (folder / ADAPTER_FILES[0]).write_text(text, encoding="utf-8")
        shutil.copy2(final / ADAPTER_FILES[1], folder)

    retry_storage(copy, folder)


def write_tensors(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write tensors as transformers names their files, with an index if there are several."""
    retry_storage(lambda: save_torch_state_dict(state, folder, max_shard_size=SHARD_BYTES), folder)


def tensor_bytes(place: Path) -> int:
    """Count the bytes of all tensors in safetensors and GGUF files.

    `place` is a folder with such files, or one file.
    """
    num_bytes = 0
    for file in [place] if place.is_file() else place.rglob("*"):
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                num_bytes += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
        elif file.suffix == ".gguf":
            num_bytes += sum(int(each.n_bytes) for each in read_gguf(file).tensors)
    return num_bytes
