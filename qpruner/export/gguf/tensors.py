"""Turn the tensors of a checkpoint and its adapter into those of a GGUF file.

Packed weights keep their bytes. llama.cpp rotates neighbouring rows of q and k in Llama, so their rows are reordered;
rows are packed one by one, so that no byte changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.export.compare import PEFT_PREFIX
from qpruner.export.gguf.architectures import Architecture, block_widths, head_size, query_scale
from qpruner.export.gguf.rope import frequency_factors
from qpruner.models.checkpoint import read_tensors
from qpruner.models.families import family_of
from qpruner.quantization.formats import format_of

if TYPE_CHECKING:
    import torch

QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
PADDED = 4
"""Fused q, k and v have an adapter of this many times the rank, of which three parts are used. llama.cpp divides alpha
by the rank, so B is multiplied by as much, and by 4 no bit is lost."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: its rows are those of `parts`, one after another, in the order `order` if there is one."""

    name: str
    type_name: str
    parts: tuple[torch.Tensor, ...]
    order: torch.Tensor | None = None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape, with bytes in the last dimension."""
        *rows, columns = self.parts[0].shape
        num_bytes = columns * self.parts[0].element_size()
        return (sum(len(part) for part in self.parts), num_bytes) if rows else (num_bytes,)

    def read(self) -> Any:
        """Put the bytes together, as a numpy array."""
        import torch

        rows = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        rows = rows if self.order is None else rows.index_select(0, self.order)
        return rows.contiguous().view(torch.uint8).numpy()


def base_tensors(checkpoint: Path, config: Any, architecture: Architecture) -> Iterator[Tensor]:
    """Yield the tensors of the model, without its adapter."""
    state = read_tensors(checkpoint, lambda name: not name.startswith(PEFT_PREFIX))
    formats = (getattr(config, "quantization_config", None) or {}).get("formats", {})
    renaming = _Renaming(config, architecture)
    for group in renaming.groups(state):
        parts, name = tuple(state[name] for name in group), renaming.new_name(group)
        if parts[0].dim() == 1:
            parts, type_name = (renaming.vector(group[0], parts[0]),), "F32"
        else:
            types = {_type_name(state[name], formats.get(name.removesuffix(".weight"))) for name in group}
            assert len(types) == 1, f"{group} have types {types}"
            type_name = types.pop()
        yield Tensor(name, type_name, parts, renaming.order(group[0]))
    factors = frequency_factors(config)
    if factors is not None:
        yield Tensor("rope_freqs.weight", "F32", (factors,))


def adapter_tensors(checkpoint: Path, config: Any, architecture: Architecture) -> Iterator[Tensor]:
    """Yield ``A (rank, columns)`` and ``B (rows, rank)`` of all layers, in the type that the checkpoint has.

    That type is exact and takes the bytes that the plan counts. Float32 is 2 % faster in decode and up to 20 % in
    prefill, for twice the bytes (rank 8 on all layers of a pruned SmolLM2, one AVX-512 core, tokens/s of decode without
    adapter 137, with one in F32 120, F16 115, BF16 118, 2026-11-29).
    """
    import torch

    stored = read_tensors(checkpoint, lambda name: name.startswith(PEFT_PREFIX))
    pairs = {
        name.removeprefix(PEFT_PREFIX).replace(".lora_A.", "."): (each, stored[name.replace(".lora_A.", ".lora_B.")])
        for name, each in stored.items()
        if ".lora_A." in name
    }
    renaming = _Renaming(config, architecture)
    for group in renaming.groups(pairs):
        lora_a, lora_b = pairs[group[0]]
        if len(group) > 1:
            unused = torch.zeros_like(lora_a)
            lora_a = torch.cat([*(pairs[name][0] for name in group), unused])
            blocks = [*(pairs[name][1] * PADDED for name in group), lora_b[:0]]
            lora_b = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        name = renaming.new_name(group)
        yield Tensor(f"{name}.lora_a", _type_name(lora_a), (lora_a,))
        yield Tensor(f"{name}.lora_b", _type_name(lora_b), (lora_b,), renaming.order(group[0]))


def adapter_alpha(checkpoint: Path) -> float:
    """Return alpha of the adapter, which llama.cpp divides by the rank."""
    settings = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    return float(settings["lora_alpha"])


def _type_name(tensor: torch.Tensor, format_name: str | None = None) -> str:
    """Name the type of a weight in GGUF files."""
    import torch

    if format_name is None:
        return {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
    found = format_of(format_name).ggml_type
    assert found, f"llama.cpp has no format {format_name}"
    return found


class _Renaming:
    """Names of llama.cpp's tensors, and what changes in the tensors."""

    def __init__(self, config: Any, architecture: Architecture) -> None:
        import gguf

        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._map = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self._config, self._architecture = config, architecture
        self._blocks, self._widths, self._size = f"{family_of(config).blocks}.", block_widths(config), head_size(config)

    def groups(self, names: Iterable[str]) -> Iterator[tuple[str, ...]]:
        """Yield the names that become one tensor: those of q, k and v if the architecture fuses them."""
        for name in names:
            linear = next((each for each in QKV if f".{each}." in name), None) if self._architecture.fuses_qkv else None
            if linear is None:
                yield (name,)
            elif linear == QKV[0]:
                yield tuple(name.replace(linear, each) for each in QKV)

    def new_name(self, group: tuple[str, ...]) -> str:
        """Return the name in the file."""
        name = group[0]
        if len(group) > 1:
            return f"blk.{self._block_of(name)}.attn_qkv.weight"
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"llama.cpp's {self._architecture.name} has no tensor for {name}"
        return str(found)

    def vector(self, name: str, vector: torch.Tensor) -> torch.Tensor:
        """Return a norm or bias in float32, in which llama.cpp computes with it."""
        vector = vector.float()
        if name.endswith("norm.weight"):
            vector = vector + self._architecture.adds_to_norms
        if self._architecture.name == "gemma3" and name.endswith("q_norm.weight"):
            vector = vector * query_scale(self._config, "gemma3")
        return vector

    def order(self, name: str) -> torch.Tensor | None:
        """Return the new order of rows of q and k, or of their biases; None for all other tensors."""
        import torch

        linear = next((each for each in QKV[:2] if f".{each}." in name), None)
        if linear is None or not self._architecture.interleaves:
            return None
        widths = self._widths[self._block_of(name)]
        num_heads = widths.heads if linear == QKV[0] else widths.key_value_heads
        rows = torch.arange(num_heads * self._size).view(num_heads, 2, self._size // 2)
        return rows.transpose(1, 2).flatten()

    def _block_of(self, name: str) -> int:
        return int(name.removeprefix(self._blocks).partition(".")[0])
