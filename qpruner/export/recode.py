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
from torch import Tensor

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

GramOf = Callable[[str], Tensor | None]
"""Maps a layer to the Gram matrix of its inputs, if GPTQ rounds it."""
NewFormat = Callable[[str, int], str]
"""Maps a packed layer's format and its columns to the format that it shall get."""


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
    config = checkpoint_config(final)
    changed = changes(final, new_format, fixed)
    old = formats_of(config)
    new = old | changed
    widths = columns_of(config)
    adapter = _adapter(final) if merge and has_adapter(final) else {}
    copy_other_files(final, folder, () if merge else ADAPTER_FILES)
    _write_config(final, folder, new)

    state = weights_of(final)
    todo = [path for path in widths if path in changed or path in adapter]
    work = "merging the adapter" if merge else "packing layers"
    for done, path in enumerate(todo, 1):
        old_format = format_of(old.get(path, DENSE))
        packed = take_weight(state, path)
        weight = old_format.unpack(packed, widths[path], torch.float32)
        if path in adapter:
            weight = weight + adapter[path]()

        target = format_of(new.get(path, DENSE))
        if target.is_packed:
            gram = gram_of(path) if getattr(target, "takes_gptq", False) else None
            tensors = pack(target, weight.to(device()), gram)
        else:
            tensors = {"weight": weight.to(config.dtype)}
        for name, tensor in tensors.items():
            state[f"{path}.{name}"] = tensor.cpu()
        on_progress(work, done, len(todo))

    if config.model_type == "gpt_neox":
        in_files, in_model = RENAMED
        state = {name.replace(in_model, in_files): tensor for name, tensor in state.items()}
    write_tensors(state, folder)
    return changed


def _write_config(final: Path, folder: Path, formats: Mapping[str, str]) -> None:
    """Write config.json with the description of the packed layers, if there are any."""
    described = read_settings(final / "config.json")
    quantization = described.pop("quantization_config", None) or {"quant_method": "qpruner"}
    packed = {path: name for path, name in formats.items() if format_of(name).is_packed}
    if packed:
        described["quantization_config"] = quantization | {"formats": packed}
    retry_storage(lambda: write_settings(described, folder / "config.json"), folder)


def changes(
    final: Path, new_format: NewFormat, fixed: Mapping[str, str] | None = None
) -> dict[str, str]:
    """List the layers to which `recode` would give another format, each with its new format."""
    config = checkpoint_config(final)
    old = formats_of(config)
    widths = columns_of(config)
    new = {path: new_format(name, widths[path]) for path, name in old.items()}
    new.update(fixed or {})
    return {path: name for path, name in new.items() if name != old.get(path, DENSE)}


def formats_of(config: Any) -> dict[str, str]:
    """Map the paths of packed layers to their formats, from the config of a checkpoint."""
    described = getattr(config, "quantization_config", None)
    return dict(described["formats"]) if described else {}


def columns_of(config: Any) -> dict[str, int]:
    """Map the paths of all layers to the columns of their weights."""
    return {
        name.removesuffix(".weight"): parameter.shape[-1]
        for name, parameter in skeleton(config).named_parameters()
        if name.endswith(".weight")
    }


def has_adapter(checkpoint: Path) -> bool:
    """Return True if a checkpoint has an adapter beside its weights."""
    return (checkpoint / ADAPTER_FILES[0]).is_file()


def take_weight(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Remove a layer's weight from the state; return its tensors by their names in the layer."""
    names = [name for name in state if name.startswith(f"{path}.weight")]
    return {name.removeprefix(f"{path}."): state.pop(name) for name in names}


def _adapter(final: Path) -> dict[str, Callable[[], Tensor]]:
    """Map the paths of layers to functions that compute what the adapter adds to their weights."""
    settings = read_settings(final / ADAPTER_FILES[0])
    tensors = adapter_of(final)
    scale = settings["lora_alpha"] / settings["r"]

    def added(lora_a: str) -> Tensor:
        lora_b = lora_a.replace(".lora_A.", ".lora_B.")
        product: Tensor = scale * (tensors[lora_b].float() @ tensors[lora_a].float())
        return product

    return {
        name.removesuffix(".lora_A.weight"): partial(added, name)
        for name in tensors
        if name.endswith(".lora_A.weight")
    }


def copy_other_files(final: Path, folder: Path, also: Sequence[str] = ()) -> None:
    """Copy all but weights, card and config; of the adapter those named in `also`."""
    left_out = {*ADAPTER_FILES, "README.md", "config.json"}.difference(also)
    ignored = shutil.ignore_patterns("model*.safetensors*", *left_out)

    def copy() -> None:
        shutil.copytree(final, folder, ignore=ignored, dirs_exist_ok=True)

    retry_storage(copy, folder)


def copy_adapter(final: Path, folder: Path, base: Path) -> None:
    """Copy the adapter as peft loads it, with the path of its base model."""
    settings = read_settings(final / ADAPTER_FILES[0])
    settings["base_model_name_or_path"] = str(base.resolve())

    def copy() -> None:
        folder.mkdir(exist_ok=True)
        write_settings(settings, folder / ADAPTER_FILES[0])
        shutil.copy2(final / ADAPTER_FILES[1], folder)

    retry_storage(copy, folder)


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint without those of its adapter."""
    return read_tensors(checkpoint, lambda name: not name.startswith(PEFT_PREFIX))


def adapter_of(checkpoint: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter by their names in the model, without peft's prefix."""
    tensors = read_tensors(checkpoint, lambda name: name.startswith(PEFT_PREFIX))
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON file of transformers or peft."""
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


def write_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Write JSON as transformers and peft do."""
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_tensors(state: dict[str, Tensor], folder: Path) -> None:
    """Write tensors to safetensors files with the file names that transformers expects.

    If they do not fit into one file of `SHARD_BYTES`, an index file is written too.
    """
    retry_storage(lambda: save_torch_state_dict(state, folder, max_shard_size=SHARD_BYTES), folder)


def tensor_bytes(place: Path) -> int:
    """Count the bytes of all tensors in safetensors and GGUF files.

    `place` is a folder with such files, or one file.
    """
    files = [place] if place.is_file() else place.rglob("*")
    return sum(_tensor_bytes_of(file) for file in files)


def _tensor_bytes_of(file: Path) -> int:
    if file.suffix == ".gguf":
        return sum(int(tensor.n_bytes) for tensor in read_gguf(file).tensors)
    if file.suffix != ".safetensors":
        return 0
    # The header's length in 8 bytes, the header, the tensors.
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header_bytes
