"""Tune the rounding of a plan's weights, one block after the other.

Each block learns to give the outputs of the unquantized model, from the outputs of the tuned blocks
before it (see `block_tuning`).

Loss of SmolLM2-135M in q4_0, embeddings in q8_0, on 182 rows of dolly (2026-12-03), before and
after 32 steps of scales at rate 0.002: GPTQ 2.634 and 2.477; tuned at rate 0.02 on 240 rows, as
here, 2.448 after them; at 0.04 on 48 rows 2.616 and 2.475; at 0.01 with the scales, on 48 rows,
2.607 and 2.457.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpruner.config.schema import TuningConfig
from qpruner.data.calibration import Samples, at_tokens
from qpruner.data.encoding import load_encoded
from qpruner.data.losses import Rows
from qpruner.data.stream import BlockStream
from qpruner.models.families import block_paths, family_of
from qpruner.models.layout import group_paths
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.quantization.bank import (
    BankSource,
    FileRecord,
    Tensors,
    read_file,
    read_grams,
    read_plan,
    write_file,
)
from qpruner.quantization.block_tuning import TunedWeight, tune_block
from qpruner.quantization.formats import Format, ScaledFormat, format_of
from qpruner.quantization.mixed import layer_tensors
from qpruner.quantization.rounding import round_together
from qpruner.runs import storage
from qpruner.runs.records import Recorded
from qpruner.runs.storage import OnPiece

VERSION = 2  # to be raised when the same inputs give other codes
BATCH_SIZE = 8  # rows of an iteration
MOST_TOKENS = 128  # that are taken of a row


class TunedRecord(Recorded):
    """Says that all blocks of a plan are tuned."""

    digest: str
    seconds: float
    """Seconds that the process took which tuned the last block."""


@dataclass(frozen=True)
class TunedPlan:
    """Says which plan is tuned, by what, and where its packed weights are.

    The folder has a file for each block, so that a process that dies loses one block.
    """

    bank: BankSource
    plan: Mapping[str, str]  # group -> name of its format
    folder: Path
    digest: str  # of all that the weights depend on
    data: Path  # folder of the encoded rows
    settings: TuningConfig

    @property
    def is_done(self) -> bool:
        """Whether all blocks are tuned; whoever reads a damaged one tunes it again."""
        record = storage.read_json(self._record, TunedRecord)
        return record is not None and record.digest == self.digest

    @property
    def _record(self) -> Path:
        return self.folder / "tuned.json"

    def file(self, block: str) -> Path:
        """Return the file with the packed weights of a block, which is named by its path."""
        return self.folder / f"{block}.safetensors"

    def read(self, config: Any, on_piece: OnPiece = lambda: None) -> Tensors:
        """Read the packed weights of the tuned layers; tune those that are missing or damaged."""
        tensors: Tensors = {}
        for block in block_paths(config):
            stored = read_file(self.file(block), self.digest, FileRecord, on_piece)
            if stored is None:

                def on_block(done: int, total: int) -> None:
                    on_piece()

                self.tune(on_block)
                return self.read(config, on_piece)
            tensors |= stored
        return tensors

    def tune(self, on_progress: Callable[[int, int], None]) -> TunedRecord:
        """Tune the blocks whose files are missing or damaged, and write them one by one.

        `on_progress` gets the number of blocks that are done, and of all.
        """
        started = time.monotonic()
        _Pass(self).run(on_progress)
        record = TunedRecord(digest=self.digest, seconds=time.monotonic() - started)
        storage.write_json(self._record, record)
        return record


def is_tunable(packing: Format) -> bool:
    """Return True if the codes of a format can be tuned; GPTQ rounds it too."""
    return isinstance(packing, ScaledFormat) and packing.takes_gptq


class _Pass:
    """One pass over the blocks of a model.

    The model holds the values of packed weights in the blocks behind the present one, and
    unquantized weights from there on.
    """

    def __init__(self, tuned: TunedPlan) -> None:
        self._tuned = tuned
        self._bank = tuned.bank
        checkpoint = storage.fetch(tuned.bank.checkpoint)
        self._model = load_dense(str(checkpoint), tuned.bank.dtype).requires_grad_(False)
        paths = group_paths(self._model.config, tuned.bank.grouping)
        self._formats = {
            path: format_of(name) for group, name in tuned.plan.items() for path in paths[group]
        }
        self._packed = read_plan(tuned.bank, tuned.plan)
        pad_id = int(load_tokenizer(str(checkpoint)).pad_token_id)
        samples = Samples(_rows(tuned), pad_id, BATCH_SIZE).by_length
        # Its hidden states are those of the unquantized model.
        self._stream = BlockStream(self._model, samples)
        self._inputs = list(self._stream.hidden)
        embeddings = family_of(self._model.config).embeddings
        if self._formats[embeddings].is_packed:
            self._unpack(embeddings, layer_tensors(self._packed, embeddings))
            self._inputs = BlockStream(self._model, samples).hidden

    def run(self, on_progress: Callable[[int, int], None]) -> None:
        """Tune all blocks that have no intact file."""
        blocks = block_paths(self._model.config)
        for index, block in enumerate(blocks):
            self._stream.advance(index)
            layers = [path for path in self._formats if path.startswith(f"{block}.")]
            fixed = [path for path in layers if not is_tunable(self._formats[path])]
            for path in fixed:
                self._unpack(path, layer_tensors(self._packed, path))
            file = self._tuned.file(block)
            tensors = read_file(file, self._tuned.digest, FileRecord)
            if tensors is None:
                tensors = self._tuned_tensors(index, [path for path in layers if path not in fixed])
                write_file(file, self._tuned.digest, tensors)
            for path in layers:
                if path not in fixed:
                    self._unpack(path, layer_tensors(tensors, path))
            with torch.no_grad():
                for batch, hidden in enumerate(self._inputs):
                    self._inputs[batch] = self._stream.run(index, batch, hidden)
            on_progress(index + 1, len(blocks))

    def _tuned_tensors(self, index: int, layers: list[str]) -> Tensors:
        """Tune the codes of layers of a block, and return their packed weights by path."""
        block = block_paths(self._model.config)[index]
        weights = self._starts(layers)
        tokens = self._stream.tokens
        targets = [
            at_tokens(hidden, mask)
            for hidden, mask in zip(self._stream.hidden, tokens, strict=True)
        ]

        def run(batch: int, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
            outputs = self._stream.run(index, batch, self._inputs[batch], values)
            return at_tokens(outputs, tokens[batch])

        named = {f"{path.removeprefix(block + '.')}.weight": weights[path] for path in layers}
        if named:
            seed = zlib.crc32(f"{self._bank.seed} {block}".encode())
            tune_block(named, run, targets, self._tuned.settings, self._model.dtype, seed)
        return {
            f"{path}.{name}": tensor.cpu()
            for path, weight in weights.items()
            for name, tensor in weight.packed().items()
        }

    def _starts(self, layers: list[str]) -> dict[str, TunedWeight]:
        """Round the weights of layers by GPTQ; those with the same inputs and format together."""
        bank = self._bank
        grams = read_grams(bank.folder, bank.inputs, self._model.config, layers) if layers else {}
        together: dict[tuple[int, str], list[str]] = {}
        for path in layers:
            together.setdefault((id(grams[path]), self._formats[path].name), []).append(path)
        starts = {}
        for paths in together.values():
            packing = self._formats[paths[0]]
            assert isinstance(packing, ScaledFormat)
            of_layers = [self._weight(path) for path in paths]
            rounded = round_together(packing, of_layers, grams[paths[0]])
            for path, start in zip(paths, rounded, strict=True):
                starts[path] = TunedWeight(packing, start)
        return starts

    def _weight(self, path: str) -> torch.Tensor:
        weight: torch.Tensor = self._model.get_submodule(path).get_parameter("weight")
        return weight

    @torch.no_grad()
    def _unpack(self, path: str, tensors: Tensors) -> None:
        """Replace the weight of a layer by the values of its packed weight, if it is packed."""
        packing = self._formats[path]
        if not packing.is_packed:
            return
        weight = self._weight(path)
        packed = {
            name: tensor.to(weight.device)
            for name, tensor in tensors.items()
            if not name.startswith("lora_")
        }
        weight.copy_(packing.unpack(packed, weight.shape[1], weight.dtype))


def _rows(tuned: TunedPlan) -> Rows:
    """Return the beginnings of training rows, at equal distances in their order."""
    rows = load_encoded(tuned.data / "train")
    count = min(tuned.settings.rows, len(rows))
    chosen = [rows[place * len(rows) // count] for place in range(count)]
    return [
        {key: list(row[key][:MOST_TOKENS]) for key in ("input_ids", "labels")} for row in chosen
    ]
