"""Check GGUF files in llama.cpp against the checkpoint from which they were written.

Three checks see different faults. The bytes of every tensor are read again from disk and compared.
Token ids are compared on the rows' texts. Predictions of llama.cpp are compared with those of
transformers: this sees what is written as wanted but means something else to llama.cpp, such as
rows in a wrong order.

llama.cpp rounds the inputs of packed layers to 8 bits and those of others to 16. How much this
changes predictions depends on the model, so it is measured: transformers computes once more with
inputs rounded as much. That result is no closer to llama.cpp's than the exact one, because errors
of rounding are chaotic.

SmolLM2 with adapter, 2026-11-29: a plan of q4_0 and q5_0 diverges by 0.0028, which is 0.84 of what
rounding makes. With q in a wrong order 2.3 (first of 30 blocks) or 0.026 (last); with shifted rows
of embeddings 7.3; without adapter 0.13, without that of block 15 0.005. The last may pass, which is
why bytes are compared too.
"""

from collections.abc import Iterator
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
from qpruner.export.gguf.writing import adapter_tensors, base_tensors
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

    Args:
        checkpoint: The folder from which the files were written.
        model: The GGUF file of the model.
        adapter: The GGUF file of the adapter; None if it is merged.
        rows: Rows of token ids, on which tokens and predictions are compared.
        on_progress: Gets a description, the number of finished pieces and of all.

    Raises:
        StageError: Bytes, token ids or predictions differ.
    """
    check_bytes(checkpoint, model, adapter, on_progress)
    for text, found, expected in isolated(token_differences, model, checkpoint, rows):
        raise export_error(
            f"llama.cpp makes other tokens of {text[:60]!r}: {found[:8]} instead of {expected[:8]}"
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


def _check_file(
    file: Path, expected: list[tuple[str, str, numpy.ndarray]], on_progress: OnWork
) -> None:
    """Compare a file's tensors with the expected names, types and bytes."""
    stored = {tensor.name: tensor for tensor in read_gguf(file).tensors}
    for done, (name, type_name, data) in enumerate(expected, 1):
        if name not in stored:
            raise export_error(f"{file.name} has no tensor `{name}`")
        tensor = stored.pop(name)
        written = tensor.data.view(numpy.uint8).ravel()
        if tensor.tensor_type.name != type_name or not numpy.array_equal(written, data.ravel()):
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
            found = llama.tokens(lead + text)
            expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            # The model has no row for a larger id either.
            if found != expected and max(expected, default=0) < llama.vocab_size:
                yield text, found, expected


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

    def to_8_bits(layer: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        # Blocks of 256 (Q8_K) for K-quants, of 32 (Q8_0) for others.
        size = 256 if layer.format.name.endswith("_k") else 32
        blocks = inputs[0].reshape(*inputs[0].shape[:-1], -1, size)
        steps = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (((blocks / steps).round() * steps).flatten(-2),)

    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return hooked(
        each.register_forward_pre_hook(to_8_bits if isinstance(each, PackedLinear) else to_16_bits)
        for each in linears
    )
