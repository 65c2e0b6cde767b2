"""Write a final model again with other formats, or with its adapter merged into the weights.

Every export starts from such a checkpoint. Layers are read, changed and written one after another, so that memory holds
one file of at most `SHARD_BYTES`, the adapter and one layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.export.compare import PEFT_PREFIX
from qpruner.models.checkpoint import RENAMED
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress
from qpruner.quantization.formats import DENSE, format_of
from qpruner.runs.storage import retry_storage

if TYPE_CHECKING:
    import torch

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 10**9

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
) -> dict[str, str]:
    """Write the model of a final folder with every packed layer in `new_format(its format, its columns)`.

    `fixed` names the formats of single layers instead. Layers that keep their format and are not merged keep their
    bytes. With `merge`, ``alpha / rank * B A`` is added to each weight in float32, which is then rounded once, to its
    format or to the model's type; no adapter is written.

    Returns:
        The layers whose format changed, each with its new format.
    """
    config, widths = checkpoint_config(final), _widths(final)
    formats = formats_of(config)
    wanted = formats | changes(final, new_format, fixed)
    added = _Adapter(final) if merge else None
    retry_storage(lambda: _copy_other_files(final, folder, {**formats, **wanted}, merge), folder)
    writer, is_neox = Shards(folder), config.model_type == "gpt_neox"
    layers = list(layers_of(final, formats))
    for done, (path, read) in enumerate(layers, 1):
        tensors = read()
        if path in formats or (added and path in added):
            tensors = _recoded(path, tensors, (formats.get(path), wanted.get(path)), widths, config.dtype, added)
        writer.add({_renamed(name, *reversed(RENAMED)): each for name, each in tensors.items()} if is_neox else tensors)
        on_progress("merging the adapter" if merge else "writing layers", done, len(layers))
    writer.close()
    return {path: name for path, name in wanted.items() if name != formats[path]}


def changes(final: Path, new_format: NewFormat, fixed: Mapping[str, str] | None = None) -> dict[str, str]:
    """List the layers to which `recode` would give another format, each with its new format."""
    formats, widths = formats_of(checkpoint_config(final)), _widths(final)
    wanted = {path: new_format(name, widths[f"{path}.weight"]) for path, name in formats.items()} | dict(fixed or {})
    return {path: name for path, name in wanted.items() if name != formats[path]}


def formats_of(config: Any) -> dict[str, str]:
    """Map the paths of packed layers to their formats, from the config of a checkpoint."""
    return dict((getattr(config, "quantization_config", None) or {"formats": {}})["formats"])


def _widths(final: Path) -> dict[str, int]:
    """Map the names of weights to their columns."""
    from qpruner.models.layout import skeleton

    return {name: parameter.shape[-1] for name, parameter in skeleton(checkpoint_config(final)).named_parameters()}


def _recoded(
    path: str,
    tensors: dict[str, torch.Tensor],
    names: tuple[str | None, str | None],
    widths: dict[str, int],
    dtype: torch.dtype,
    adapter: _Adapter | None,
) -> dict[str, torch.Tensor]:
    """Give the tensors of a layer another format, with its adapter added; its bias stays."""
    import torch

    stored, (old, new) = {name.removeprefix(f"{path}."): each for name, each in tensors.items()}, names
    added = adapter.of(path) if adapter else None
    if old == new and added is None:
        return tensors
    others = {f"{path}.{name}": stored.pop(name) for name in list(stored) if not name.startswith("weight")}
    weight = format_of(old or DENSE).unpack(stored, widths[f"{path}.weight"], torch.float32)
    weight = weight if added is None else weight + added
    found = format_of(new or DENSE)
    packed = found.pack(weight) if found.is_packed else {"weight": weight.to(dtype)}
    return others | {f"{path}.{name}": tensor for name, tensor in packed.items()}


class _Adapter:
    """The adapter of a final model, as what it adds to each weight."""

    def __init__(self, final: Path) -> None:
        from safetensors.torch import load_file

        settings = json.loads((final / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        self._scale = settings["lora_alpha"] / settings["r"]
        self._tensors = {
            name.removeprefix(PEFT_PREFIX): each for name, each in load_file(final / ADAPTER_FILES[1]).items()
        }

    def __contains__(self, path: str) -> bool:
        return f"{path}.lora_A.weight" in self._tensors

    def of(self, path: str) -> torch.Tensor | None:
        """Compute ``alpha / rank * B A`` in float32; None for a layer without an adapter."""
        if path not in self:
            return None
        lora_a, lora_b = (self._tensors[f"{path}.lora_{side}.weight"].float() for side in "AB")
        added: torch.Tensor = self._scale * (lora_b @ lora_a)
        return added


def layers_of(final: Path, formats: dict[str, str]) -> Iterator[tuple[str, Callable[[], dict[str, torch.Tensor]]]]:
    """Yield the path of each layer, with a function that reads its tensors; names are those in the model."""
    from safetensors import safe_open

    places: dict[str, dict[str, tuple[Path, str]]] = {}
    for shard in sorted(final.glob("model*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118
                name = _renamed(stored, *RENAMED)
                parents = [name[:end] for end in range(len(name)) if name[end] == "."]  # of `path.weight.absmax`
                path = next((parent for parent in parents if parent in formats), parents[-1])
                places.setdefault(path, {})[name] = shard, stored

    def reader(path: str) -> Callable[[], dict[str, torch.Tensor]]:
        def read() -> dict[str, torch.Tensor]:
            with ExitStack() as stack:
                shards = {shard for shard, _ in places[path].values()}
                files: dict[Path, Any] = {each: stack.enter_context(safe_open(each, "pt")) for each in shards}
                return {name: files[shard].get_tensor(stored) for name, (shard, stored) in places[path].items()}

        return read

    for path in places:
        yield path, reader(path)


def _renamed(name: str, old: str, new: str) -> str:
    return f"{new}{name.removeprefix(old)}" if name.startswith(old) else name


def _copy_other_files(final: Path, folder: Path, formats: dict[str, str], merge: bool) -> None:
    """Copy all but weights and card; the config gets the new formats."""
    left_out = [*(ADAPTER_FILES if merge else ()), "model*.safetensors", INDEX, "README.md", "config.json"]
    shutil.copytree(final, folder, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
    config = json.loads((final / "config.json").read_text(encoding="utf-8"))
    packed = {path: name for path, name in formats.items() if format_of(name).is_packed}
    if packed:
        config["quantization_config"]["formats"] = packed
    else:
        config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Shards:
    """Writes tensors to files of at most `SHARD_BYTES`, named as transformers does, with an index if there are two."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, torch.Tensor] = {}
        self._names: list[list[str]] = []
        self._num_bytes = self._total_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take tensors, and write those taken before if there is no room for more."""
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and self._num_bytes + num_bytes > SHARD_BYTES:
            self._write()
        self._tensors |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._num_bytes += num_bytes
        self._total_bytes += num_bytes

    def _write(self) -> None:
        from safetensors.torch import save_file

        place = self._folder / f"part-{len(self._names)}"
        retry_storage(lambda: save_file(self._tensors, place, {"format": "pt"}), place)
        self._names.append(list(self._tensors))
        self._tensors, self._num_bytes = {}, 0

    def close(self) -> None:
        """Write the rest, and give the files their names."""
        self._write()
        count, weight_map = len(self._names), dict[str, str]()
        for index, names in enumerate(self._names):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            (self._folder / f"part-{index}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index_text = json.dumps({"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}, indent=2)
            retry_storage(lambda: (self._folder / INDEX).write_text(index_text + "\n", encoding="utf-8"), self._folder)
