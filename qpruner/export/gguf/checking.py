"""Load GGUF files in llama.cpp, and compare them with the checkpoint they were written from.

Three checks see different faults. The bytes of every tensor are read again from disk and compared.
Token ids are compared on the rows' texts. Predictions of llama.cpp are compared with those of
transformers: this sees what is written as intended but means something else to llama.cpp, such as
rows in a wrong order.

llama.cpp rounds the inputs of packed layers to 8 bits and those of others to 16. How much this
changes predictions depends on the model, so it is measured: transformers computes once more with
inputs rounded as much. That result is no closer to llama.cpp's than the exact one, because errors
of rounding are chaotic.

SmolLM2 with adapter, 2026-11-29: a plan of q4_0 and q5_0 diverges by 0.0028, which is 0.84 of what
rounding makes. With q in a wrong order it is 2.3 (first of 30 blocks) or 0.026 (last), with shifted
rows of embeddings 7.3, without adapter 0.13, and without that of block 15 0.005. The last may pass,
which is why bytes are compared too.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy
import torch

from qpruner.data.losses import hooked
from qpruner.export.compare import TOP, Compared, Rows, compare_served, export_error
from qpruner.export.gguf.isolation import isolated
from qpruner.export.gguf.llama_cpp import Llama, predictions
from qpruner.export.gguf.vocabulary import NO_CHATS, differing_texts
from qpruner.export.gguf.writing import Tensor, adapter_tensors, base_tensors
from qpruner.models.gguf_reader import read_gguf
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress, load_tokenizer
from qpruner.quantization.formats.layers import PackedLinear


def check(
    checkpoint: Path,
    model: Path,
    adapter: Path | None,
    rows: Rows,
    on_progress: OnWork = ignore_progress,
) -> Compared:
    """Compare the files of a model and its adapter with their checkpoint.

    Bytes, token ids and then the predictions on `rows` of token ids are compared.

    Raises:
        StageError: One of them differs.
    """
    check_bytes(checkpoint, model, adapter, on_progress)
    for text, served, expected in isolated(token_differences, model, checkpoint, rows):
        raise export_error(
            f"llama.cpp makes other tokens of {text[:60]!r}: {served[:8]} instead of {expected[:8]}"
        )
    return check_predictions(checkpoint, model, adapter, rows, on_progress)


def check_bytes(
    checkpoint: Path, model: Path, adapter: Path | None, on_progress: OnWork = ignore_progress
) -> None:
    """Read the files again, and compare types and bytes of all tensors with the checkpoint."""
    config = checkpoint_config(checkpoint)
    _check_file(model, list(base_tensors(checkpoint, config)), on_progress)
    if adapter:
        _check_file(adapter, list(adapter_tensors(checkpoint, config)), on_progress)


def _check_file(file: Path, expected: Sequence[Tensor], on_progress: OnWork) -> None:
    stored = {tensor.name: tensor for tensor in read_gguf(file).tensors}
    for done, (name, type_name, data) in enumerate(expected, 1):
        tensor = stored.pop(name, None)
        if tensor is None:
            raise export_error(f"{file.name} has no tensor `{name}`")
        stored_bytes = tensor.data.view(numpy.uint8).ravel()
        is_same_type = tensor.tensor_type.name == type_name
        if not is_same_type or not numpy.array_equal(stored_bytes, data.ravel()):
            raise export_error(f"{file.name} has other bytes in `{name}`")
        on_progress("reading the file again", done, len(expected))
    if stored:
        raise export_error(f"{file.name} has a tensor that the checkpoint lacks: `{min(stored)}`")


def token_differences(
    model: Path, checkpoint: Path, rows: Rows
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Compare the token ids that llama.cpp makes of the rows' texts with the tokenizer's.

    Only their characters of ASCII are compared: see `vocabulary.remark` for others.

    Yields:
        A text whose ids differ, the ids of llama.cpp and those of the tokenizer.
    """
    tokenizer = load_tokenizer(str(checkpoint))
    lead = " " if differing_texts(tokenizer) == NO_CHATS else ""
    with Llama(model) as llama:
        for row in rows:
            decoded = tokenizer.decode(row, skip_special_tokens=True)
            text = decoded.encode("ascii", "ignore").decode().strip()
            served = llama.tokens(lead + text)
            expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            # The model has no row for a larger id either.
            if served != expected and max(expected, default=0) < llama.vocab_size:
                yield text, served, expected


def check_predictions(
    checkpoint: Path,
    model: Path,
    adapter: Path | None,
    rows: Rows,
    on_progress: OnWork = ignore_progress,
) -> Compared:
    """Compare log-probabilities at all positions of rows."""
    answers = isolated(predictions, model, adapter, rows, TOP, torch.get_num_threads())
    return compare_served(checkpoint, rows, answers, next(answers), rounding_inputs, on_progress)


def rounding_inputs(model: Any) -> AbstractContextManager[None]:
    """Make linear layers round their inputs as llama.cpp does: to 8 bits if packed, else to 16."""
    dtype = model.config.dtype

    def to_16_bits(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0].to(dtype).float(),)

    hooks = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            rounding = _to_8_bits if isinstance(layer, PackedLinear) else to_16_bits
            hooks.append(layer.register_forward_pre_hook(rounding))
    return hooked(hooks)


def _to_8_bits(layer: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Round the inputs ``(..., columns)`` of a layer, by blocks, to 8 bits with a common scale."""
    # Blocks of 256 (Q8_K) for K-quants, of 32 (Q8_0) for others.
    size = 256 if layer.format.name.endswith("_k") else 32
    *batch, _ = inputs[0].shape
    blocks = inputs[0].reshape(*batch, -1, size)
    largest = blocks.abs().amax(-1, keepdim=True)
    steps = largest.clamp(min=1e-30) / 127
    rounded = (blocks / steps).round() * steps
    return (rounded.flatten(-2),)
