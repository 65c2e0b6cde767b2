"""Make and read the bank, which holds every group of layers in every format for all trials.

An entry has the packed weights and the initial adapters of one (group, format). It depends on these
two only, not on the rest of a plan. It is a safetensors file with the packed tensors of the group's
layers, and `<layer>.lora_A` and `<layer>.lora_B`; its `EntryRecord` lies beside it. Whoever needs
an entry that is missing or damaged makes it (`read_plan`). Two processes may do so at once, because
they write equal, whole files.
"""

import functools
import hashlib
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qpruner.config.schema import LoraConfig
from qpruner.errors import CorruptFile, TrainingDiverged
from qpruner.models.checkpoint import read_tensors
from qpruner.models.layout import group_linears, group_paths, logits_path
from qpruner.models.loading import checkpoint_config, device
from qpruner.plans.plan import OUTSIDE_BLOCKS, Group
from qpruner.quantization.formats import Format, Method, format_of, formats, trained_by
from qpruner.quantization.loftq import loftq_start
from qpruner.quantization.mixed import layer_tensors
from qpruner.quantization.rounding import change_size, pack_together
from qpruner.runs import storage
from qpruner.runs.records import Recorded, digest_of
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import OnPiece

VERSION = 6  # version of the entries: raise it when the same inputs give different tensors
GRAMS = "grams"  # subfolder with the Gram matrices of layers' inputs, a file for each block
FEW_WEIGHTS = 10_000_000
"""A model with fewer weights is packed without Ray, which would take longer to start."""

Tensors = dict[str, torch.Tensor]
Pair = tuple[str, str]
"""A group and a packed format that it may have."""
Kind = TypeVar("Kind", bound="FileRecord")

logger = logging.getLogger(__name__)


class FileRecord(Recorded):
    """Identifies a tensor file of a bank: the digest of its inputs, and its sha256."""

    inputs: str
    sha256: str


class EntryRecord(FileRecord):
    """Identifies an entry, and says how much of its error the initial adapters leave."""

    residual_ratio: float
    """Norm of the error with initial adapters, divided by the norm without them.

    The error is that of the weights or, under GPTQ, of the outputs.
    """
    error: float  # squared norm of that error, divided by that of the weights (or outputs)


@dataclass(frozen=True)
class BankSource:
    """Says where the bank of a cut is, and what its entries are made from.

    The paths are the same on every node.
    """

    folder: Path
    checkpoint: Path
    grouping: str  # `quantize.group`
    dtype: str
    lora: LoraConfig
    seed: int
    inputs: str = ""  # digest of all that the entries depend on besides their formats
    uses_grams: bool = False  # whether GPTQ rounds weights, by the Gram matrices in `GRAMS`
    method: Method = "adapter"  # `training.method`

    def file(self, group: str, level: str) -> Path:
        """Return the path of the entry of a (group, format)."""
        return self.folder / level / f"{group}.safetensors"

    def digest(self, level: str) -> str:
        """Compute the digest of an entry's inputs and of what packs its format."""
        packing = format_of(level)
        package_version = version(packing.package) if packing.package else ""
        return digest_of(self.inputs, level, packing.version, package_version)

    def digests(self, levels: Iterable[str]) -> list[str]:
        """List the `digest` of each packed format among `levels`."""
        return [self.digest(level) for level in sorted(set(levels)) if format_of(level).is_packed]

    def entry(self, group: str, level: str) -> EntryRecord | None:
        """Read the record of an entry; return None if it is missing, damaged or of other inputs."""
        record = _read_record(self.file(group, level), EntryRecord)
        if record is None or record.inputs != self.digest(level):
            return None
        return record

    def has_grams(self) -> bool:
        """Return True if all Gram matrices that GPTQ needs are there, or if it needs none.

        Their sha256 is checked where they are read: of a model of 8 billion parameters they are 20
        GB a cut.
        """
        if not self.uses_grams:
            return True
        config = checkpoint_config(storage.fetch(self.checkpoint))
        groups = group_linears(config, self.grouping).values()
        layers = [logits_path(config), *(paths[0] for paths in groups)]
        files = sorted({grams_file(self.folder, path) for path in layers})

        def is_there(file: Path) -> bool:
            return self.is_current(file) and storage.exists(file)

        return all(storage.for_each(is_there, files))

    def is_current(self, path: Path) -> bool:
        """Return True if a file is an entry, or has Gram matrices, of the present inputs."""
        level = path.parent.name
        if level == GRAMS:
            record = _read_record(path, FileRecord)
            return record is not None and record.inputs == self.inputs
        if level not in formats() or format_of(level).missing():
            return False
        return self.entry(path.stem, level) is not None


@dataclass(frozen=True)
class Entry:
    """Holds the tensors of one (group, format), and the errors of its `EntryRecord`."""

    tensors: Tensors
    residual_ratio: float
    error: float


def build_entries(
    weights: Mapping[str, torch.Tensor],
    packings: Iterable[Format],
    lora_of: Callable[[Format], LoraConfig | None],
    seed: int,
    grams: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Entry]:
    """Pack the layers of a group in several formats, and yield one entry for each format.

    Args:
        weights: Path of each layer and its weight ``(rows, columns)``.
        packings: The formats.
        lora_of: Maps a format to the settings of the initial adapters; None makes no adapters.
        seed: Seeds the randomized SVD of LoftQ.
        grams: For GPTQ, path of each layer and the Gram matrix of its inputs (columns, columns).
            Layers with the same matrix are packed together.
    """
    gram_of = grams or dict.fromkeys(weights)
    total = sum(change_size(weight.float(), gram_of[path]) ** 2 for path, weight in weights.items())
    sharing: dict[int, list[str]] = {}  # the layers with each Gram matrix
    for path in weights:
        sharing.setdefault(id(gram_of[path]), []).append(path)

    for packing in packings:
        layers: dict[str, Tensors] = {}
        for paths in sharing.values():
            together = pack_together(packing, [weights[path] for path in paths], gram_of[paths[0]])
            layers.update(zip(paths, together, strict=True))

        lora = lora_of(packing)
        tensors: Tensors = {}
        plain = 0.0  # squared error without adapters
        left = 0.0  # squared error with them
        for path, packed in layers.items():
            weight = weights[path]
            if lora is None or lora.init == "plain":
                unpacked = packing.unpack(packed, weight.shape[1], torch.float32)
                error = change_size(weight.float() - unpacked, gram_of[path])
                plain += error**2
                left += error**2
            else:
                start = loftq_start(weight, packed, packing, lora, seed, gram_of[path])
                packed = start.packed
                tensors[f"{path}.lora_A"] = start.lora_a
                tensors[f"{path}.lora_B"] = start.lora_b
                plain += start.plain_error**2
                left += start.error**2
            for name, tensor in packed.items():
                tensors[f"{path}.{name}"] = tensor

        yield Entry(
            tensors={name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            residual_ratio=(left / plain) ** 0.5 if plain else 1.0,
            error=left / total if total else 0.0,
        )


def make_entries(
    bank: BankSource, group: str, levels: Sequence[str], on_piece: OnPiece = lambda: None
) -> Iterator[tuple[EntryRecord, Tensors]]:
    """Pack a group in several formats on this process's device, and yield the written entries."""
    checkpoint = storage.fetch(bank.checkpoint, on_piece)
    config = checkpoint_config(checkpoint)
    paths = group_paths(config, bank.grouping)[group]
    names = {f"{path}.weight": path for path in paths}
    stored = read_tensors(checkpoint, names.__contains__, on_piece)
    for name in names:
        if not torch.isfinite(stored[name]).all():
            raise TrainingDiverged(f"the weight {name} is NaN or infinite")

    dtype = getattr(torch, bank.dtype)
    weights = {names[name]: tensor.to(device(), dtype) for name, tensor in stored.items()}
    grams = read_grams(bank.folder, bank.inputs, config, paths) if bank.uses_grams else None

    def lora_of(packing: Format) -> LoraConfig | None:
        has_adapter = trained_by(bank.method, [packing.name]) == "adapter"
        return bank.lora if has_adapter and group not in OUTSIDE_BLOCKS else None

    entries = build_entries(weights, map(format_of, levels), lora_of, bank.seed, grams)
    for level, entry in zip(levels, entries, strict=True):
        yield write_entry(bank, group, level, entry), entry.tensors
        on_piece()


def write_entry(bank: BankSource, group: str, level: str, entry: Entry) -> EntryRecord:
    """Write an entry and then its record, without which it does not count."""
    path = bank.file(group, level)
    record = EntryRecord(
        inputs=bank.digest(level),
        sha256=_write_tensors(path, entry.tensors),
        residual_ratio=entry.residual_ratio,
        error=entry.error,
    )
    storage.write_json(record_path(path), record)
    return record


def write_grams(bank: BankSource, grams: Mapping[tuple[str, ...], torch.Tensor]) -> None:
    """Write the Gram matrices of a block or the head.

    Each is stored under the paths of the layers that share the input.
    """
    named: Tensors = {}
    for paths, gram in grams.items():
        path = grams_file(bank.folder, paths[0])  # the same for all
        named[" ".join(paths)] = gram.cpu().contiguous()
    write_file(path, bank.inputs, named)


def read_plan(
    bank: BankSource, plan: Mapping[str, str], on_piece: OnPiece = lambda: None
) -> Tensors:
    """Read the tensors of all groups that a plan packs; make missing and damaged entries."""
    packed = [(group, level) for group, level in plan.items() if format_of(level).is_packed]
    # Trials that begin together make different entries, and find each other's.
    random.SystemRandom().shuffle(packed)

    tensors: Tensors = {}
    num_made = 0
    for group, level in packed:
        path = bank.file(group, level)
        entry = read_file(path, bank.digest(level), EntryRecord, on_piece)
        if entry is None:
            [(_, entry)] = make_entries(bank, group, (level,), on_piece)
            num_made += 1
        tensors |= entry
        on_piece()
    if num_made:
        logger.info("%d entries of %s were made", num_made, storage.display_name(bank.folder))
    return tensors


def read_grams(folder: Path, inputs: str, config: Any, paths: Sequence[str]) -> Tensors:
    """Read the Gram matrices ``(columns, columns)`` of inputs of a block's layers or of a table.

    Embeddings that are not tied only look rows up, and have none.

    Raises:
        CorruptFile: The file is missing, damaged or changed.
    """
    path = grams_file(folder, paths[0])
    is_table = path.stem == paths[0]  # tables are in no block
    if is_table and paths[0] != logits_path(config):
        return {}
    stored = read_file(path, inputs, FileRecord)
    if stored is None:
        record = _read_record(path, FileRecord)
        if record and record.inputs == inputs:
            storage.remove(record_path(path))
        raise CorruptFile(
            f"{storage.display_name(path)}, by which GPTQ rounds, is missing, damaged or changed",
            path,
        )

    grams: Tensors = {}
    for names, gram in stored.items():
        sharing = [name for name in names.split() if name in paths]
        if sharing:
            grams |= dict.fromkeys(sharing, gram.to(device()))
    return grams


def grams_file(folder: Path, path: str) -> Path:
    """Return the file with the Gram matrices of a layer's block; the head has a file of its own."""
    block = re.sub(r"(\.\d+)\..*", r"\1", path)  # up to the index of the block
    return folder / GRAMS / f"{block}.safetensors"


def record_path(path: Path) -> Path:
    """Return the path of the record of a tensor file."""
    return path.with_suffix(".json")


class Starts:
    """Computes the unpacked weights, adapters included, with which trials start.

    The files of the bank are memory-mapped, so a CPU needs memory for one layer's float32 weight
    only.
    """

    def __init__(self, bank: BankSource, groups: Iterable[Group]) -> None:
        self.groups = {group.name: group for group in groups}
        self._scaling = bank.lora.alpha / bank.lora.rank
        self._entries: dict[Pair, Tensors] = {}
        for group in self.groups.values():
            for level in group.packed:
                self._entries[group.name, level] = read_plan(bank, {group.name: level})

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs of a group and a packed format that it may have, group by group."""
        return tuple(self._entries)

    def weight(self, group: str, level: str, path: str, like: torch.Tensor) -> torch.Tensor:
        """Compute a layer's float32 weight at the start of a trial, on the device of `like`.

        `like` is the layer's unquantized weight ``(rows, columns)``.
        """
        stored = layer_tensors(self._entries[group, level], path)
        tensors = {name: tensor.to(like.device) for name, tensor in stored.items()}
        lora_a = tensors.pop("lora_A", None)
        lora_b = tensors.pop("lora_B", None)
        weight = format_of(level).unpack(tensors, like.shape[1], torch.float32)
        if lora_a is None or lora_b is None:  # no adapter, or `lora.init: plain`
            return weight
        return weight.addmm_(lora_b, lora_a, alpha=self._scaling)


def write_file(path: Path, inputs: str, tensors: Tensors) -> None:
    """Write a tensor file, and then its record, without which it does not count.

    `inputs` is the digest of all that the tensors depend on.
    """
    record = FileRecord(inputs=inputs, sha256=_write_tensors(path, tensors))
    storage.write_json(record_path(path), record)


def _write_tensors(path: Path, tensors: Tensors) -> str:
    """Write a tensor file, which a reader sees as a whole or not at all; return its sha256."""
    data = save(tensors)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.storage_at(path).write(data, durable=False)  # its sha256 shows what a crash loses

    storage.retry_storage(write, path)
    return hashlib.sha256(data).hexdigest()


def _read_record(path: Path, kind: type[Kind]) -> Kind | None:
    try:
        return storage.read_json(record_path(path), kind)
    except CorruptFile as error:  # without its record the file does not count
        logger.warning("%s", error)
        return None


def read_file(
    path: Path, inputs: str, kind: type[FileRecord], on_piece: OnPiece = lambda: None
) -> Tensors | None:
    """Read a tensor file of these inputs; return None if it is missing or damaged.

    Damage is logged.
    """
    record = _read_record(path, kind)
    if record is None or record.inputs != inputs:
        return None
    sha256 = record.sha256
    with suppress(FileNotFoundError, SafetensorError):
        source = storage.retry_storage(lambda: _verified(path, sha256, on_piece), path)
        if source:
            tensors: Tensors = storage.retry_storage(lambda: load_file(source), path)
            return tensors
    logger.warning("%s is damaged and made again", storage.display_name(path))
    return None


def _verified(path: Path, sha256: str, on_piece: OnPiece) -> Path | None:
    """Return a bank file, or its cached copy if storage is remote.

    Return None if the file does not have this sha256.
    """
    cache = os.environ.get(BANK_CACHE)
    if not cache and storage.storage_at(path).fills_this_disk:
        return path if _is_intact(path, sha256) else None

    folder = Path(cache) if cache else storage.cache_root() / "bank"
    copy = folder / f"{sha256}.safetensors"
    if _is_intact(copy, sha256):
        return copy
    with storage.exclusive(copy, on_piece):
        if _is_intact(copy, sha256):  # another reader has fetched it meanwhile
            return copy
        # The next reader overwrites what a killed reader left here.
        aside = copy.with_name(f"{copy.name}.part")
        if storage.fetch_file(path, aside, on_piece) != sha256:
            aside.unlink()
            return None
        aside.replace(copy)
    return copy


def _is_intact(file: Path, sha256: str) -> bool:
    return file.is_file() and _digest_once(file, file.stat().st_mtime_ns) == sha256


@functools.cache
def _digest_once(path: Path, modified_ns: int) -> str:
    """Compute the sha256 of a file; the result is cached until the modification time changes."""
    return storage.file_digest(path)
