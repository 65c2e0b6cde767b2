"""Build and read the bank: packed weights and initial adapters of every (group, format), computed once for all trials.

An entry depends on its group and format only, not on the rest of a plan. Each entry is a safetensors file with the
packed tensors of the group's layers, and `<layer>.lora_A` and `<layer>.lora_B`. The index `bank.json` has the sha256
of each file. A process checks the sha256 when it first reads a file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qpruner.config.schema import LoraConfig
from qpruner.errors import CorruptFile, TrainingDiverged
from qpruner.models.checkpoint import read_tensors
from qpruner.models.loading import device
from qpruner.quantization.formats import Format, format_of
from qpruner.quantization.loftq import loftq_start
from qpruner.quantization.mixed import layer_tensors
from qpruner.quantization.rounding import change_size, pack
from qpruner.runs import storage
from qpruner.runs.records import Recorded, digest_of
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import OnPiece

VERSION = 3
"""Version of the entries: raise it when the same inputs give different tensors."""
INDEX = "bank.json"
FEW_WEIGHTS = 10_000_000
"""A model with fewer weights is packed without Ray, because starting Ray would take longer than packing."""


class IndexEntry(Recorded):
    """A file of the bank: its `entry_digest`, sha256, and what is left of the weights' error."""

    inputs: str
    sha256: str
    residual_ratio: float
    """Norm of the error with initial adapters (of the weights; under GPTQ, of the outputs), divided by that without."""
    error: float
    """Squared norm of that error, divided by that of the weights (or outputs)."""


class BankIndex(Recorded):
    """Contents of `bank.json`: the digest of the inputs of the bank stage, and an entry for each file name."""

    digest: str
    files: dict[str, IndexEntry]


@dataclass(frozen=True)
class Entry:
    """The tensors of one (group, format), and the errors of `IndexEntry`."""

    tensors: dict[str, torch.Tensor]
    residual_ratio: float
    error: float


def build_entry(
    weights: Mapping[str, torch.Tensor],
    packing: Format,
    lora: LoraConfig | None,
    seed: int,
    grams: Mapping[str, torch.Tensor] | None = None,
) -> Entry:
    """Pack the layers of a group (path -> weight ``(rows, columns)``); without `lora` they get no adapter.

    `grams` has the Gram matrix of the inputs ``(columns, columns)`` of layers that GPTQ is to round.
    """
    tensors: dict[str, torch.Tensor] = {}
    total, plain, left = 0.0, 0.0, 0.0
    for path, weight in weights.items():
        gram = grams.get(path) if grams else None
        if lora is None or lora.init == "plain":
            packed = pack(packing, weight, gram)
            error = change_size(weight.float() - packing.unpack(packed, weight.shape[1], torch.float32), gram)
            plain, left, total = plain + error**2, left + error**2, total + change_size(weight.float(), gram) ** 2
        else:
            start = loftq_start(weight, packing, lora, seed, gram)
            packed = start.packed
            tensors |= {f"{path}.lora_A": start.lora_a.contiguous(), f"{path}.lora_B": start.lora_b.contiguous()}
            plain, left, total = plain + start.plain_error**2, left + start.error**2, total + start.size**2
        tensors |= {f"{path}.{name}": tensor for name, tensor in packed.items()}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return Entry(on_cpu, (left / plain) ** 0.5 if plain else 1.0, left / total if total else 0.0)


def entry_digest(inputs: str, level: str) -> str:
    """Compute the digest of all that an entry depends on: of its `inputs`, and of what packs its format."""
    packing = format_of(level)
    return digest_of(inputs, level, packing.version, version(packing.package) if packing.package else "")


def entry_file(bank: Path, group: str, level: str) -> Path:
    """Return the path of the file of one (group, format)."""
    return bank / level / f"{group}.safetensors"


def write_entry(bank: Path, group: str, level: str, tensors: dict[str, torch.Tensor]) -> Path:
    """Write the tensors of one (group, format) to a file and return its path."""
    path = entry_file(bank, group, level)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it readable for the owner only

    storage.retry_storage(write, path)
    return path


@dataclass(frozen=True)
class GroupJob:
    """A group of layers (one entry of a plan) to pack in each of `levels`, in this process or on a worker."""

    group: str
    paths: tuple[str, ...]
    """Paths of the group's layers in the model."""
    levels: tuple[str, ...]
    """Formats to pack in."""
    checkpoint: Path
    bank: Path
    dtype: str
    lora: LoraConfig | None
    """None for embeddings and head, which have no adapter."""
    seed: int
    inputs: str = ""
    """Digest of all that the entries depend on besides their formats."""
    grams: Path | None = None
    """File with the Gram matrices of the layers' inputs, if GPTQ rounds them."""
    threads: int | None = None


def build_group(job: GroupJob) -> dict[str, IndexEntry]:
    """Pack a group, write a file for each format, and return index entries by file name."""
    if job.threads and not torch.cuda.is_available():
        torch.set_num_threads(job.threads)
    names = {f"{path}.weight": path for path in job.paths}
    stored = read_tensors(storage.fetch(job.checkpoint), names.__contains__)
    for name in names:
        if not torch.isfinite(stored[name]).all():
            raise TrainingDiverged(f"the weight {name} is NaN or infinite")
    weights = {names[name]: tensor.to(device(), getattr(torch, job.dtype)) for name, tensor in stored.items()}
    grams = read_grams(job.grams, job.paths) if job.grams else None
    built = {}
    for level in job.levels:
        entry = build_entry(weights, format_of(level), job.lora, job.seed, grams)
        file = write_entry(storage.storage_at(job.bank).staging, job.group, level, entry.tensors)
        sha256 = storage.put_file(file, entry_file(job.bank, job.group, level))
        name = str(entry_file(Path(), job.group, level))
        errors = {"residual_ratio": entry.residual_ratio, "error": entry.error}
        built[name] = IndexEntry(inputs=entry_digest(job.inputs, level), sha256=sha256, **errors)
    return built


def write_grams(file: Path, grams: Mapping[tuple[str, ...], torch.Tensor]) -> None:
    """Write the Gram matrices of a block, each under the paths of the layers that share the input."""
    named = {" ".join(paths): gram.cpu().contiguous() for paths, gram in grams.items()}
    storage.retry_storage(lambda: save_file(named, file), file)


def read_grams(file: Path, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read the Gram matrices of the inputs of some layers, float32 ``(columns, columns)``."""
    stored = load_file(storage.fetch(file.parent) / file.name)
    by_path = {path: gram for names, gram in stored.items() for path in names.split()}
    return {path: by_path[path].to(device()) for path in paths}


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


def read_plan(bank: Path, plan: Mapping[str, str], on_piece: OnPiece = lambda: None) -> dict[str, torch.Tensor]:
    """Read the tensors of all groups that a plan packs; raise `CorruptFile` if a file is missing or damaged."""
    wanted = {group: level for group, level in plan.items() if format_of(level).is_packed}
    if not wanted:
        return {}
    index = read_index(bank)
    tensors: dict[str, torch.Tensor] = {}
    for group, level in wanted.items():
        path = entry_file(bank, group, level)
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
    """Initial weights of trials: unpacked, with the adapter added, for every group and packed format.

    The files of the bank are memory-mapped, so a CPU needs memory for one layer's float32 weight only. `groups` maps
    each group to the paths of its layers, `offered` to the formats that it takes; `scaling` is LoRA's alpha / rank.
    """

    def __init__(
        self, bank: Path, groups: Mapping[str, Sequence[str]], offered: Mapping[str, Sequence[str]], scaling: float
    ) -> None:
        self.groups = groups
        self.offered = {
            group: tuple(level for level in levels if format_of(level).is_packed) for group, levels in offered.items()
        }
        self._scaling = scaling
        self._entries = {
            (group, level): read_plan(bank, {group: level}) for group in groups for level in self.offered[group]
        }

    def weight(self, group: str, level: str, path: str, like: torch.Tensor) -> torch.Tensor:
        """Compute the float32 weight of the layer at `path` at the start of a trial, of shape and device `like`."""
        stored = layer_tensors(self._entries[group, level], path)
        own = {name: tensor.to(like.device) for name, tensor in stored.items()}
        lora_a, lora_b = own.pop("lora_A", None), own.pop("lora_B", None)
        weight = format_of(level).unpack(own, like.shape[1], torch.float32)
        if lora_a is None or lora_b is None:  # no adapter, or `lora.init: plain`
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
