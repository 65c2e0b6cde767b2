"""Write a checkpoint and its adapter as GGUF files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.export.gguf.architectures import Architecture, architecture_of, block_widths, context_length, head_size
from qpruner.export.gguf.rope import add_rope
from qpruner.export.gguf.tensors import Tensor, adapter_alpha, adapter_tensors, base_tensors
from qpruner.export.gguf.vocabulary import add_vocabulary
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress
from qpruner.runs.storage import retry_storage

if TYPE_CHECKING:
    import gguf

FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_S"}
"""Names of file types other than `MOSTLY_` and the type of most weights."""


def write_gguf(checkpoint: Path, file: Path, name: str, on_progress: OnWork = ignore_progress) -> None:
    """Write a checkpoint without its adapter; its packed layers must all have formats of llama.cpp.

    `name` is that of the model in the metadata.
    """
    import gguf

    config = checkpoint_config(checkpoint)
    architecture = architecture_of(config)
    tensors = list(base_tensors(checkpoint, config, architecture))

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(tensors))
        _add_sizes(writer, config, architecture)
        add_rope(writer, config)
        add_vocabulary(writer, checkpoint, config.vocab_size)

    _write(file, architecture, describe, tensors, on_progress)


def write_adapter(checkpoint: Path, file: Path, on_progress: OnWork = ignore_progress) -> None:
    """Write the adapter of a checkpoint, to be loaded with the file that `write_gguf` writes."""
    import gguf

    config = checkpoint_config(checkpoint)
    architecture = architecture_of(config)

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_name(file.stem)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter_alpha(checkpoint))

    _write(file, architecture, describe, list(adapter_tensors(checkpoint, config, architecture)), on_progress)


def _write(
    file: Path,
    architecture: Architecture,
    describe: Callable[[gguf.GGUFWriter], None],
    tensors: Sequence[Tensor],
    on_progress: OnWork,
) -> None:
    """Write metadata, then the tensors one by one; begin again while the storage is full or away."""
    import gguf
    import numpy

    def write() -> None:
        with closing(gguf.GGUFWriter(file, architecture.name)) as writer:
            describe(writer)
            for tensor in tensors:
                shape, kind = tensor.byte_shape, gguf.GGMLQuantizationType[tensor.type_name]
                writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.uint8), math.prod(shape), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            stream = writer.fout[0]
            writer.write_padding(stream, stream.tell())
            for done, tensor in enumerate(tensors, 1):
                stream.write(tensor.read())  # numpy's `tofile` does not say that a disk is full
                writer.write_padding(stream, stream.tell())
                on_progress("writing GGUF", done, len(tensors))

    retry_storage(write, file)


def _file_type(tensors: Sequence[Tensor]) -> int:
    """Return the number of the type that most weights have."""
    import gguf

    counted = Counter[str]()
    for tensor in tensors:
        if len(tensor.byte_shape) > 1:
            num_weights, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type_name]]
            counted[tensor.type_name] += math.prod(tensor.byte_shape) // num_bytes * num_weights
    most = counted.most_common(1)[0][0]
    return int(gguf.LlamaFileType[FILE_TYPES.get(most, f"MOSTLY_{most}")])


def _add_sizes(writer: gguf.GGUFWriter, config: Any, architecture: Architecture) -> None:
    """Write widths, norms, windows and caps."""
    widths, size = block_widths(config), head_size(config)
    heads, key_value_heads, channels = (list(each) for each in zip(*widths, strict=True))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads if architecture.is_ragged else heads[0])
    writer.add_head_count_kv(key_value_heads if architecture.is_ragged else key_value_heads[0])
    writer.add_feed_forward_length(channels if architecture.is_ragged else channels[0])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture.is_gemma:
        windows = [each == "sliding_attention" for each in config.layer_types]
        if any(windows) or architecture.name == "gemma2":
            writer.add_sliding_window(config.sliding_window)
            writer.add_sliding_window_pattern(windows)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
