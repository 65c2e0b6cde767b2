"""Build and read the bank: packed weights and initial adapters of every (group, bits), computed once for all trials.

An entry depends on its group and bits only, not on the rest of a plan. Each entry is a safetensors file with the
bitsandbytes tensors of the group's layers, and `<layer>.lora_A` and `<layer>.lora_B`. The index `bank.json` has
the sha256 of each file. A process checks the sha256 when it first reads a file.
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
from qpruner.models.checkpoint import read_tensors
from qpruner.models.loading import device
from qpruner.plans.plan import FULL_BITS
from qpruner.quantization.loftq import loftq_start
from qpruner.quantization.mixed import layer_tensors, pack, unpack
from qpruner.runs import storage
from qpruner.runs.records import Recorded
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import OnPiece

FORMAT = 2
"""Version of the entries: raise it when the same inputs give different tensors."""
INDEX = "bank.json"
FEW_WEIGHTS = 10_000_000
"""A model with fewer weights is packed without Ray, because starting Ray would take longer than packing."""


class IndexEntry(Recorded):
    """A file of the bank: digest of what it was made from, sha256, and (weight error with adapters) / (without)."""

    inputs: str
    sha256: str
    residual_ratio: float


class BankIndex(Recorded):
    """Contents of `bank.json`: the digest of the inputs of the bank stage, and an entry for each file name."""

    digest: str
    files: dict[str, IndexEntry]


def build_entry(
    weights: Mapping[str, torch.Tensor], bits: int, lora: LoraConfig, double_quant: bool, seed: int
) -> tuple[dict[str, torch.Tensor], float]:
    """Quantize the layers of a group (path -> weight ``(rows, columns)``) at 4 or 8 bits.

    Return the tensors of the entry, and the ratio of LoftQ's error to that of plain quantization (1 without LoftQ).
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
    """Return the path of the file of one (group, bits)."""
    return bank / f"{bits}bit" / f"{group}.safetensors"


def write_entry(bank: Path, group: str, bits: int, tensors: dict[str, torch.Tensor]) -> Path:
    """Write the tensors of one (group, bits) to a file and return its path."""
    path = entry_file(bank, group, bits)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)

    storage.retry_storage(write, path)
    return path


@dataclass(frozen=True)
class GroupJob:
    """A group of layers (one entry of a plan) to pack at each of `bits`, in this process or on a worker."""

    group: str
    paths: tuple[str, ...]
    """Paths of the group's layers in the model."""
    bits: tuple[int, ...]
    """Bit-widths to pack at, all below 16."""
    checkpoint: Path
    bank: Path
    dtype: str
    lora: LoraConfig
    double_quant: bool
    seed: int
    inputs: str = ""
    """Digest of the inputs of the entries, to be written into the index."""
    threads: int | None = None


def build_group(job: GroupJob) -> dict[str, IndexEntry]:
    """Pack a group, write a file for each bit-width, and return index entries by file name."""
    if job.threads and not torch.cuda.is_available():
        torch.set_num_threads(job.threads)
    names = {f"{path}.weight": path for path in job.paths}
    stored = read_tensors(storage.fetch(job.checkpoint), names.__contains__)
    for name in names:
        if not torch.isfinite(stored[name]).all():
            raise TrainingDiverged(f"the weight {name} is NaN or infinite")
    weights = {names[name]: tensor.to(device(), getattr(torch, job.dtype)) for name, tensor in stored.items()}
    built = {}
    for bits in job.bits:
        tensors, ratio = build_entry(weights, bits, job.lora, job.double_quant, job.seed)
        file = write_entry(storage.storage_at(job.bank).staging, job.group, bits, tensors)
        sha256 = storage.put_file(file, entry_file(job.bank, job.group, bits))
        name = str(entry_file(Path(), job.group, bits))
        built[name] = IndexEntry(inputs=job.inputs, sha256=sha256, residual_ratio=ratio)
    return built


def read_index(bank: Path) -> BankIndex:
    """Read the index of a bank; raise `CorruptFile` if it is missing or damaged."""
    index = storage.read_json(bank / INDEX, BankIndex)
    if index is None:
        raise CorruptFile(f"bank {storage.display_name(bank)} has no {INDEX}; repeat the command to rebuild it", bank)
    return index


def intact_files(bank: Path, expected: Mapping[str, str]) -> list[str]:
    """List the files of a bank that exist and have the expected sha256."""
    existing = storage.files_in(bank)
    names = [name for name in expected if name in existing]
    found = storage.for_each(storage.file_digest, [bank / name for name in names])
    return [name for name, sha256 in zip(names, found, strict=True) if sha256 == expected[name]]


def read_plan(
    bank: Path, bits_by_group: Mapping[str, int], on_piece: OnPiece = lambda: None
) -> dict[str, torch.Tensor]:
    """Read the tensors of all groups that a plan quantizes; raise `CorruptFile` if a file is missing or damaged."""
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
            source = storage.retry_storage(read, path, was_there=True)
            if source is None:
                raise CorruptFile(f"bank file {storage.display_name(path)} does not match {INDEX}; {remedy}", path)
            tensors |= storage.retry_storage(functools.partial(load_file, source), path)
            on_piece()
        except (FileNotFoundError, SafetensorError) as error:
            raise CorruptFile(
                f"bank file {storage.display_name(path)} cannot be read: {error}; {remedy}", path
            ) from error
    return tensors


class Starts:
    """Initial weights of trials: dequantized, with the adapter added, for every group and bit-width below 16.

    The files of the bank are memory-mapped, so a CPU needs memory for one layer's float32 weight only. `groups` maps
    each group to the paths of its linear layers; `scaling` is LoRA's factor alpha / rank.
    """

    def __init__(self, bank: Path, groups: Mapping[str, Sequence[str]], levels: Sequence[int], scaling: float) -> None:
        self.groups = groups
        self.levels = tuple(bits for bits in levels if bits != FULL_BITS)
        self._scaling = scaling
        self._entries = {(group, bits): read_plan(bank, {group: bits}) for group in groups for bits in self.levels}

    def weight(self, group: str, bits: int, path: str, device: torch.device) -> torch.Tensor:
        """Compute the float32 weight ``(rows, columns)`` that the layer at `path` has at the start of a trial.

        8-bit layers also round their inputs (LLM.int8); the weight does not include that error.
        """
        stored = layer_tensors(self._entries[group, bits], path)
        own = {name: tensor.to(device) for name, tensor in stored.items()}
        lora_a, lora_b = own.pop("lora_A", None), own.pop("lora_B", None)
        weight = unpack(own, torch.float32)
        if lora_a is None or lora_b is None:  # `lora.init: plain`
            return weight
        return weight.addmm_(lora_b, lora_a, alpha=self._scaling)


def _verified(path: Path, sha256: str, on_piece: OnPiece) -> Path | None:
    """Return a bank file, or its cached copy if storage is remote; None if it does not have this sha256."""
    named = os.environ.get(BANK_CACHE)
    if not named and storage.storage_at(path).fills_this_disk:
        return path if _digest_once(path, path.stat().st_mtime_ns) == sha256 else None
    copy = (Path(named) if named else storage.cache_root() / "bank") / f"{sha256}.safetensors"
    if _is_intact(copy, sha256):
        return copy
    with storage.exclusive(copy, on_piece):
        if not _is_intact(copy, sha256):
            aside = copy.with_name(f"{copy.name}.part")  # the next reader overwrites what a killed reader left
            if storage.fetch_file(path, aside, on_piece) != sha256:
                aside.unlink()
                return None
            aside.replace(copy)
    return copy


def _is_intact(copy: Path, sha256: str) -> bool:
    return copy.is_file() and _digest_once(copy, copy.stat().st_mtime_ns) == sha256


@functools.cache
def _digest_once(path: Path, modified_ns: int) -> str:
    """Compute the sha256 of a file; the result is cached until the modification time changes."""
    return storage.file_digest(path)
