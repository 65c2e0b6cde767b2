"""Write a checkpoint and its adapter as GGUF files.

Packed weights are copied byte by byte. llama.cpp turns neighbouring rows of q and k in Llama, so their rows are
reordered; rows are packed one by one, so that no byte changes.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.export.gguf.architectures import (
    Architecture,
    architecture_of,
    block_widths,
    context_length,
    head_size,
    query_scale,
)
from qpruner.export.gguf.rope import add_rope, frequency_factors
from qpruner.models.checkpoint import read_tensors
from qpruner.models.families import family_of
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress
from qpruner.quantization.formats import format_of

if TYPE_CHECKING:
    import gguf
    import torch

ADAPTER_PREFIX = "base_model.model."
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_S"}
"""Names of file types that are not `MOSTLY_` and the type of most weights."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its rows are those of `parts`, one after another, in the order `order` if there is one."""

    name: str
    type_name: str
    parts: tuple[torch.Tensor, ...]
    order: torch.Tensor | None = None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape with bytes in the last dimension."""
        *rows, columns = self.parts[0].shape
        num_bytes = columns * self.parts[0].element_size()
        return (sum(len(part) for part in self.parts), num_bytes) if rows else (num_bytes,)

    def read(self) -> Any:
        """Put the bytes together, as a numpy array."""
        import torch

        rows = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        rows = rows if self.order is None else rows.index_select(0, self.order)
        return rows.contiguous().view(torch.uint8).numpy()


def write_gguf(checkpoint: Path, file: Path, name: str, on_progress: OnWork = ignore_progress) -> None:
    """Write a checkpoint, whose packed layers all have formats of llama.cpp, without its adapter.

    `name` is stated in the metadata.
    """
    import gguf

    config = checkpoint_config(checkpoint)
    architecture = architecture_of(config)
    tensors = list(_base_tensors(checkpoint, config, architecture))
    with closing(gguf.GGUFWriter(file, architecture.name)) as writer:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(tensors))
        _add_sizes(writer, config, architecture)
        add_rope(writer, config)
        vocabulary = importlib.import_module("qpruner.export.gguf.vocabulary")
        vocabulary.add_vocabulary(writer, checkpoint, config.vocab_size)
        _write(writer, tensors, on_progress)


def write_adapter(checkpoint: Path, file: Path, on_progress: OnWork = ignore_progress) -> None:
    """Write the adapter of a checkpoint, to be loaded beside the file of `write_gguf`."""
    import gguf

    config = checkpoint_config(checkpoint)
    architecture = architecture_of(config)
    settings = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = list(_adapter_tensors(checkpoint, config, architecture))
    with closing(gguf.GGUFWriter(file, architecture.name)) as writer:
        writer.add_type("adapter")
        writer.add_name(file.stem)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"])
        _write(writer, tensors, on_progress)


def _write(writer: gguf.GGUFWriter, tensors: list[_Tensor], on_progress: OnWork) -> None:
    """Write metadata, then the tensors one by one."""
    import gguf
    import numpy as np

    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        num_bytes = int(np.prod(tensor.byte_shape))
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(tensors, 1):
        writer.write_tensor_data(tensor.read())
        on_progress("writing GGUF", done, len(tensors))


def _file_type(tensors: list[_Tensor]) -> int:
    """Name the type of most weights."""
    import gguf

    counted = Counter[str]()
    for tensor in tensors:
        if len(tensor.byte_shape) > 1:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type_name]]
            counted[tensor.type_name] += tensor.byte_shape[0] * tensor.byte_shape[1] // size * block
    most = counted.most_common(1)[0][0]
    return int(gguf.LlamaFileType[FILE_TYPES.get(most, f"MOSTLY_{most}")])


def _add_sizes(writer: gguf.GGUFWriter, config: Any, architecture: Architecture) -> None:
    """Write widths, norms, windows and caps."""
    widths, size = block_widths(config), head_size(config)
    heads, key_value_heads, channels = (list(each) for each in zip(*widths, strict=True))
    alike = len(set(widths)) == 1 and architecture.name not in ("deci", "openelm")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads[0] if alike else heads)
    writer.add_head_count_kv(key_value_heads[0] if alike else key_value_heads)
    writer.add_feed_forward_length(channels[0] if alike else channels)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture.name.startswith("gemma"):
        windows = [each == "sliding_attention" for each in config.layer_types]
        if any(windows) or architecture.name == "gemma2":
            writer.add_sliding_window(config.sliding_window)
            writer.add_sliding_window_pattern(windows)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _base_tensors(checkpoint: Path, config: Any, architecture: Architecture) -> Iterator[_Tensor]:
    """Yield the tensors of the model in the order of the checkpoint's layers."""
    import torch

    state = read_tensors(checkpoint, lambda name: not name.startswith(ADAPTER_PREFIX))
    formats = (getattr(config, "quantization_config", None) or {}).get("formats", {})
    names = _Names(config, architecture)
    for group in names.grouped(state):
        parts = tuple(state[name] for name in group)
        if parts[0].dim() == 1:
            yield _Tensor(names.of(group), "F32", (names.vector(group[0], parts[0]),), names.order(group[0]))
            continue
        types = {_type_name(formats.get(name.removesuffix(".weight")), state[name]) for name in group}
        assert len(types) == 1, f"{group} have types {types}"
        yield _Tensor(names.of(group), types.pop(), parts, names.order(group[0]))
    factors = frequency_factors(config)
    if factors is not None:
        yield _Tensor("rope_freqs.weight", "F32", (factors.to(torch.float32),))


def _type_name(format_name: str | None, tensor: torch.Tensor) -> str:
    import torch

    if format_name is None:
        return {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
    found = format_of(format_name).ggml_type
    assert found, f"llama.cpp has no format {format_name}"
    return found


class _Names:
    """Names of tensors in files of llama.cpp, and what changes about the tensors."""

    def __init__(self, config: Any, architecture: Architecture) -> None:
        import gguf

        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._map = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self._config, self._architecture = config, architecture
        self._blocks, self._widths, self._size = f"{family_of(config).blocks}.", block_widths(config), head_size(config)

    def grouped(self, names: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
        """Yield names of tensors that are one in the file: q, k and v if the architecture fuses them."""
        for name in names:
            linear = next((each for each in QKV if f".{each}." in name), None) if self._architecture.fuses_qkv else None
            if linear is None:
                yield (name,)
            elif linear == QKV[0]:
                yield tuple(name.replace(linear, each) for each in QKV)

    def of(self, group: tuple[str, ...]) -> str:
        """Return the name in the file."""
        name = group[0].replace("q_proj", "qkv_proj") if len(group) > 1 else group[0]
        if len(group) > 1:
            index = name.removeprefix(self._blocks).partition(".")[0]
            return f"blk.{index}.attn_qkv.{name.rpartition('.')[2]}"
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"llama.cpp's {self._architecture.name} has no tensor for {name}"
        return str(found)

    def vector(self, name: str, vector: torch.Tensor) -> torch.Tensor:
        """Return a norm or bias in float32, as llama.cpp computes with it."""
        vector = vector.float()
        if name.endswith("norm.weight"):
            vector = vector + self._architecture.adds_to_norms
        if self._architecture.name == "gemma3" and name.endswith("q_norm.weight"):
            vector = vector * query_scale(self._config, "gemma3")
        return vector

    def order(self, name: str) -> torch.Tensor | None:
        """Return the order of the rows of q and k, weights and biases, if it changes."""
        import torch

        if not self._architecture.interleaves or not any(f".{each}." in name for each in QKV[:2]):
            return None
        widths = self._widths[int(name.removeprefix(self._blocks).partition(".")[0])]
        num_heads = widths.heads if f".{QKV[0]}." in name else widths.key_value_heads
        rows = torch.arange(num_heads * self._size).view(num_heads, 2, self._size // 2)
        return rows.transpose(1, 2).flatten()


def _adapter_tensors(checkpoint: Path, config: Any, architecture: Architecture) -> Iterator[_Tensor]:
    """Yield ``A (rank, columns)`` and ``B (rows, rank)`` of all layers."""
    import torch

    stored = read_tensors(checkpoint, lambda name: name.startswith(ADAPTER_PREFIX))
    pairs = {
        name.removeprefix(ADAPTER_PREFIX).replace(".lora_A.", "."): (each, stored[name.replace("_A.", "_B.")])
        for name, each in stored.items()
        if ".lora_A." in name
    }
    names = _Names(config, architecture)
    for group in names.grouped(pairs):
        lora_a = torch.cat([pairs[name][0] for name in group])
        # llama.cpp divides alpha by the rank of each tensor, which fusing has multiplied.
        parts_b = [pairs[name][1] * len(group) for name in group]
        lora_b: torch.Tensor = torch.block_diag(*parts_b)  # type: ignore[no-untyped-call]
        for part, each, order in (("a", lora_a, None), ("b", lora_b, names.order(group[0]))):
            yield _Tensor(f"{names.of(group)}.lora_{part}", ADAPTER_TYPE, (each.to(torch.float32),), order)


ADAPTER_TYPE = "F32"
