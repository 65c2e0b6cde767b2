"""Build and read the bank: packed weights and adapter start of every (group, bits), computed once for all trials.

The start of a group depends on the group and its bits, not on the rest of the plan. Every entry is a safetensors file:
the layers' serialized bitsandbytes tensors, and `<layer>.lora_A` / `<layer>.lora_B`. `bank.json` beside them holds
what each was made from and its sha256, which a process checks when it first reads the file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qpruner.config.schema import LoraConfig
from qpruner.errors import CorruptFile, TrainingDiverged
from qpruner.models.checkpoint import dense_tensors
from qpruner.models.loading import device
from qpruner.plans.plan import FULL_BITS
from qpruner.quantization.loftq import loftq_start
from qpruner.quantization.mixed import layer_tensors, pack, unpack
from qpruner.runs.records import Recorded
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import (
    OnPiece,
    cache_root,
    display_name,
    exclusive,
    fetch,
    fetch_file,
    file_digest,
    files_in,
    for_each,
    put_file,
    read_json,
    retry_storage,
    storage_at,
)

FORMAT = 2
"""Rises when an entry of the same inputs would hold other tensors."""
INDEX = "bank.json"
FEW_WEIGHTS = 10_000_000
"""Packing fewer takes less time than starting Ray."""


class IndexEntry(Recorded):
    """One file of the index: the digest of its inputs, its sha256, and |W - Q - BA| / |W - Q| (Frobenius)."""

    inputs: str
    sha256: str
    residual_ratio: float


class BankIndex(Recorded):
    """`bank.json`: the bank's digest, and every file by its name."""

    digest: str
    files: dict[str, IndexEntry]


def build_entry(
    weights: Mapping[str, torch.Tensor], bits: int, lora: LoraConfig, double_quant: bool, seed: int
) -> tuple[dict[str, torch.Tensor], float]:
    """Quantize a group's layers (path -> weight ``(rows, columns)``) at 4 or 8 bits; a pure function.

    Returns:
        The tensors of the entry, and the error left over that of plain quantization; 1 without LoftQ.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain, left = 0.0, 0.0
    for path, weight in weights.items():
        if lora.init == "plain":
            packed = pack(weight, bits, double_quant)
        else:
            start = loftq_start(weight, bits, lora, double_quant, seed)
            packed = start.packed
            tensors |= {f"{path}.lora_A": start.lora_a.contiguous(), f"{path}.lora_B": start.lora_b.contiguous()}
            plain += start.plain_error**2
            left += start.error**2
        tensors |= {f"{path}.{name}": tensor for name, tensor in packed.items()}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return on_cpu, (left / plain) ** 0.5 if plain else 1.0


def entry_file(bank: Path, group: str, bits: int) -> Path:
    """Return the path of an entry."""
    return bank / f"{bits}bit" / f"{group}.safetensors"


def write_entry(bank: Path, group: str, bits: int, tensors: dict[str, torch.Tensor]) -> Path:
    """Write an entry's file and return its path."""
    path = entry_file(bank, group, bits)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)

    retry_storage(write, path)
    return path


@dataclass(frozen=True)
class GroupJob:
    """One group to be packed at some bit-widths, here or on a worker."""

    group: str
    paths: tuple[str, ...]
    """Of the group's layers."""
    bits: tuple[int, ...]
    """Below 16."""
    checkpoint: Path
    bank: Path
    dtype: str
    lora: LoraConfig
    double_quant: bool
    seed: int
    inputs: str = ""
    """Digest of what all of this stands for, for the index."""
    threads: int | None = None


def build_group(job: GroupJob) -> dict[str, IndexEntry]:
    """Pack a group and write its files; return their entries of the index."""
    if job.threads and not torch.cuda.is_available():
        torch.set_num_threads(job.threads)
    names = {f"{path}.weight": path for path in job.paths}
    stored = dense_tensors(fetch(job.checkpoint), names.__contains__)
    for name in names:
        if not torch.isfinite(stored[name]).all():
            raise TrainingDiverged(f"the weight {name} is NaN or infinite")
    weights = {names[name]: tensor.to(device(), getattr(torch, job.dtype)) for name, tensor in stored.items()}
    built = {}
    for bits in job.bits:
        tensors, ratio = build_entry(weights, bits, job.lora, job.double_quant, job.seed)
        file = write_entry(storage_at(job.bank).staging, job.group, bits, tensors)
        sha256 = put_file(file, entry_file(job.bank, job.group, bits))
        name = str(entry_file(Path(), job.group, bits))
        built[name] = IndexEntry(inputs=job.inputs, sha256=sha256, residual_ratio=ratio)
    return built


def read_index(bank: Path) -> BankIndex:
    """Read a bank's index; `CorruptFile` if there is none, or none that can be read."""
    index = read_json(bank / INDEX, BankIndex)
    if index is None:
        raise CorruptFile(f"bank {display_name(bank)} has no {INDEX}", bank)
    return index


def intact_files(bank: Path, index: BankIndex) -> list[str]:
    """List the files that exist and have the sha256 of the index."""
    there = files_in(bank)
    names = [name for name in index.files if name in there]
    found = for_each(file_digest, [bank / name for name in names])
    return [name for name, sha256 in zip(names, found, strict=True) if sha256 == index.files[name].sha256]


def read_plan(
    bank: Path, bits_by_group: Mapping[str, int], on_piece: OnPiece = lambda: None
) -> dict[str, torch.Tensor]:
    """Read the tensors of all groups that a plan quantizes; raises `CorruptFile` for a missing or damaged file."""
    wanted = {group: bits for group, bits in bits_by_group.items() if bits != FULL_BITS}
    if not wanted:
        return {}
    index = read_index(bank)
    tensors: dict[str, torch.Tensor] = {}
    for group, bits in wanted.items():
        path = entry_file(bank, group, bits)
        entry = index.files.get(str(path.relative_to(bank)))
        remedy = "repeat the command to rebuild it"
        try:
            read = functools.partial(_verified, path, entry.sha256 if entry else "", on_piece)
            source = retry_storage(read, path, was_there=True)
            if source is None:
                raise CorruptFile(f"bank file {display_name(path)} is not what {INDEX} says; {remedy}", path)
            tensors |= retry_storage(functools.partial(load_file, source), path)
            on_piece()
        except (FileNotFoundError, SafetensorError) as error:
            raise CorruptFile(f"bank file {display_name(path)} cannot be read: {error}; {remedy}", path) from error
    return tensors


class Starts:
    """Dequantized weights with their adapters added, for every (group, bits) below 16 in the bank.

    Files of the bank are mapped, not copied, so on a CPU memory is one layer's float32 weight. `groups` maps each
    group to the paths of its linear layers; `scaling` is the factor of the adapters' product (alpha / rank).
    """

    def __init__(self, bank: Path, groups: Mapping[str, Sequence[str]], levels: Sequence[int], scaling: float) -> None:
        self.groups = groups
        self.levels = tuple(bits for bits in levels if bits != FULL_BITS)
        self._scaling = scaling
        self._entries = {(group, bits): read_plan(bank, {group: bits}) for group in groups for bits in self.levels}

    def weight(self, group: str, bits: int, path: str, device: torch.device) -> torch.Tensor:
        """Compute the weight ``(rows, columns)`` float32 of the layer at `path` at the start of a trial.

        8-bit layers round their inputs too (LLM.int8), which no weight can show.
        """
        stored = layer_tensors(self._entries[group, bits], path)
        own = {name: tensor.to(device) for name, tensor in stored.items()}
        lora_a, lora_b = own.pop("lora_A", None), own.pop("lora_B", None)
        weight = unpack(own, torch.float32)
        if lora_a is None or lora_b is None:  # `lora.init: plain`
            return weight
        return weight.addmm_(lora_b, lora_a, alpha=self._scaling)


def _verified(path: Path, sha256: str, on_piece: OnPiece) -> Path | None:
    """Return the path to read a bank's file from: the file, or this machine's copy, which the first reader makes.

    None if the contents are others.
    """
    named = os.environ.get(BANK_CACHE)
    if not named and storage_at(path).fills_this_disk:
        return path if _digest_once(path, path.stat().st_mtime_ns) == sha256 else None
    copy = (Path(named) if named else cache_root() / "bank") / f"{sha256}.safetensors"
    if _is_intact(copy, sha256):
        return copy
    with exclusive(copy, on_piece):
        if not _is_intact(copy, sha256):
            aside = copy.with_name(f"{copy.name}.part")  # the next reader overwrites what a killed one left
            if fetch_file(path, aside, on_piece) != sha256:
                aside.unlink()
                return None
            aside.replace(copy)
    return copy


def _is_intact(copy: Path, sha256: str) -> bool:
    return copy.is_file() and _digest_once(copy, copy.stat().st_mtime_ns) == sha256


@functools.cache
def _digest_once(path: Path, modified_ns: int) -> str:
    """Compute a file's sha256 once a process, and again after it was written."""
    return file_digest(path)
