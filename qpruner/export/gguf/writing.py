"""Write a checkpoint and its adapter as GGUF files.

Packed weights keep their bytes. llama.cpp rotates neighbouring rows of q and k in Llama, so their
rows are reordered; rows are packed one by one, so that no byte changes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qpruner.export.gguf.architectures import (
    LLAMAS,
    RAGGED,
    architecture_of,
    block_widths,
    context_length,
    head_size,
    query_scale,
    rope_parameters,
)
from qpruner.export.gguf.vocabulary import stop_ids, vocabulary
from qpruner.export.recode import adapter_of, formats_of, read_settings, weights_of
from qpruner.models.families import family_of
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress, load_tokenizer
from qpruner.quantization.formats import format_of
from qpruner.runs.storage import retry_storage

FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_S"}
"""Names of file types other than `MOSTLY_` and the type of most weights."""
TYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
QUERY = "self_attn.q_proj"
KEY = "self_attn.k_proj"
QKV = (QUERY, KEY, "self_attn.v_proj")
PADDED = 4
"""Fused q, k and v have an adapter of this many times the rank, of which three parts are used.
llama.cpp divides alpha by the rank, so B is multiplied by as much, and by 4 no bit is lost."""


class Tensor(NamedTuple):
    """A tensor of a file, with its bytes as a numpy array.

    The array has the shape ``(rows, bytes)``, or ``(bytes,)`` for a vector.
    """

    name: str
    type_name: str
    data: Any


def write_gguf(
    checkpoint: Path, file: Path, name: str, on_progress: OnWork = ignore_progress
) -> None:
    """Write a checkpoint without its adapter; `name` is that of the model in the metadata."""
    config = checkpoint_config(checkpoint)
    tensors = list(base_tensors(checkpoint, config))
    type_names = Counter(tensor.type_name for tensor in tensors if tensor.data.ndim > 1)
    [(most_common, _)] = type_names.most_common(1)
    file_type = FILE_TYPES.get(most_common, f"MOSTLY_{most_common}")
    tokenizer = load_tokenizer(str(checkpoint))
    vocabulary_values = vocabulary(tokenizer, config.vocab_size, stop_ids(checkpoint))

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        _add_sizes(writer, config)
        _add_rope(writer, config)
        for key, value in vocabulary_values.items():
            getattr(writer, f"add_{key}")(value)

    _write(file, config, describe, tensors, on_progress)


def write_adapter(checkpoint: Path, file: Path, on_progress: OnWork = ignore_progress) -> None:
    """Write the adapter of a checkpoint, to be loaded with the file that `write_gguf` writes."""
    config = checkpoint_config(checkpoint)
    alpha = float(read_settings(checkpoint / "adapter_config.json")["lora_alpha"])
    tensors = list(adapter_tensors(checkpoint, config))

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_name(file.stem)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    _write(file, config, describe, tensors, on_progress)


def _write(
    file: Path,
    config: Any,
    describe: Callable[[Any], None],
    tensors: Sequence[Tensor],
    on_progress: OnWork,
) -> None:
    """Write metadata, then the tensors one by one.

    Begin again while the storage is full or away.
    """

    def write() -> None:
        with closing(gguf.GGUFWriter(file, architecture_of(config))) as writer:
            describe(writer)
            for name, type_name, data in tensors:
                number = gguf.GGMLQuantizationType[type_name]
                writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()

            assert writer.fout is not None
            stream = writer.fout[0]
            writer.write_padding(stream, stream.tell())
            for done, tensor in enumerate(tensors, 1):
                stream.write(tensor.data)  # numpy's `tofile` does not say that a disk is full
                writer.write_padding(stream, stream.tell())
                on_progress("writing GGUF", done, len(tensors))

    retry_storage(write, file)


# ---- metadata


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)

    architecture = architecture_of(config)
    widths = block_widths(config)
    if architecture in RAGGED:
        writer.add_head_count([block.heads for block in widths])
        writer.add_head_count_kv([block.key_value_heads for block in widths])
        writer.add_feed_forward_length([block.channels for block in widths])
    else:
        writer.add_head_count(widths[0].heads)
        writer.add_head_count_kv(widths[0].key_value_heads)
        writer.add_feed_forward_length(widths[0].channels)

    size = head_size(config)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture.startswith("gemma"):
        _add_gemma(writer, config, architecture)


def _add_gemma(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    windows = [layer_type == "sliding_attention" for layer_type in config.layer_types]
    if any(windows) or architecture == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(windows)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write how positions rotate queries and keys, and how that is stretched to longer contexts."""
    rope = rope_parameters(config)
    local = rope_parameters(config, "sliding_attention")
    writer.add_rope_freq_base(rope["rope_theta"])
    if local is not rope:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _frequency_factors(config: Any) -> torch.Tensor:
    """Compute by how much the scaling `llama3` lowers each frequency.

    The factors are float32 ``(head size / 2,)``.
    """
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    frequencies = 1.0 / rope_parameters(config)["rope_theta"] ** exponents
    factors: torch.Tensor = frequencies / scaled
    return factors


# ---- tensors


def base_tensors(checkpoint: Path, config: Any) -> Iterator[Tensor]:
    """Yield the tensors of the model, without its adapter."""
    state = weights_of(checkpoint)
    formats = formats_of(config)
    renaming = _Renaming(config)
    for group in renaming.groups(state):
        first = group[0]
        format_names = {formats.get(name.removesuffix(".weight")) for name in group}
        assert len(format_names) == 1, f"{group} have other formats"
        tensor = state[first]
        if len(group) > 1:
            tensor = torch.cat([state[name] for name in group])
        if tensor.dim() == 1:
            tensor = renaming.vector(first, tensor)
        tensor = renaming.reorder(first, tensor)
        yield _tensor(renaming.new_name(group), tensor, format_names.pop())
    if rope_parameters(config)["rope_type"] == "llama3":
        yield _tensor("rope_freqs.weight", _frequency_factors(config))


def adapter_tensors(checkpoint: Path, config: Any) -> Iterator[Tensor]:
    """Yield ``A (rank, columns)`` and ``B (rows, rank)`` of all layers.

    They have the type of the checkpoint, which is exact and takes the bytes that the plan counts.
    Float32 is 2 % faster in decode and up to 20 % in prefill, for twice the bytes (rank 8 on all
    layers of a pruned SmolLM2, one AVX-512 core, tokens/s of decode without adapter 137, with one
    in F32 120, F16 115, BF16 118, 2026-11-29).
    """
    stored = adapter_of(checkpoint)
    layers = [name.replace(".lora_A.", ".") for name in stored if ".lora_A." in name]
    renaming = _Renaming(config)
    for group in renaming.groups(layers):
        all_a = [stored[name.replace(".weight", ".lora_A.weight")] for name in group]
        all_b = [stored[name.replace(".weight", ".lora_B.weight")] for name in group]
        lora_a = all_a[0]
        lora_b = all_b[0]
        if len(group) > 1:
            unused = torch.zeros_like(lora_a)
            no_rows = lora_b[:0]
            lora_a = torch.cat([*all_a, unused])
            blocks = [*(tensor * PADDED for tensor in all_b), no_rows]
            lora_b = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        name = renaming.new_name(group)
        yield _tensor(f"{name}.lora_a", lora_a)
        yield _tensor(f"{name}.lora_b", renaming.reorder(group[0], lora_b))


def _tensor(name: str, tensor: torch.Tensor, format_name: str | None = None) -> Tensor:
    """Take the bytes of a tensor, which is packed if it has a format."""
    if format_name is None:
        type_name = TYPE_NAMES[tensor.dtype]
    else:
        type_name = format_of(format_name).ggml_type
        assert type_name, f"llama.cpp has no format {format_name}"
    return Tensor(name, type_name, tensor.contiguous().view(torch.uint8).numpy())


def _linear(name: str) -> str | None:
    """Return which of q, k and v a tensor belongs to; None if to no one of them."""
    return next((linear for linear in QKV if f".{linear}." in name), None)


class _Renaming:
    """Names of llama.cpp's tensors, and what changes in the tensors."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._architecture = architecture_of(config)
        self._blocks = f"{family_of(config).blocks}."
        self._widths = block_widths(config)
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        number = numbers[self._architecture]
        self._map = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def groups(self, names: Iterable[str]) -> Iterator[tuple[str, ...]]:
        """Yield the names that become one tensor: those of q, k and v in `openelm`."""
        for name in names:
            linear = _linear(name)
            if linear is None or self._architecture != "openelm":
                yield (name,)
            elif linear == QUERY:
                yield tuple(name.replace(linear, part) for part in QKV)

    def new_name(self, group: tuple[str, ...]) -> str:
        """Return the name in the file."""
        first = group[0]
        if len(group) > 1:
            return f"blk.{self._block_of(first)}.attn_qkv.weight"
        name = self._map.get_name(first, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"llama.cpp's {self._architecture} has no tensor for {first}"
        return str(name)

    def vector(self, name: str, vector: torch.Tensor) -> torch.Tensor:
        """Return a norm or bias in float32, in which llama.cpp computes with it."""
        vector = vector.float()
        if name.endswith("norm.weight") and self._architecture.startswith("gemma"):
            vector = vector + 1  # Gemma computes `1 + weight`
        if name.endswith("q_norm.weight") and self._architecture == "gemma3":
            vector = vector * query_scale(self._config, "gemma3")
        return vector

    def reorder(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Reorder the rows of q and k, or of their biases, if the architecture pairs neighbours."""
        linear = _linear(name)
        if linear not in (QUERY, KEY) or self._architecture not in LLAMAS:
            return tensor
        widths = self._widths[self._block_of(name)]
        num_heads = widths.heads if linear == QUERY else widths.key_value_heads
        size = head_size(self._config)
        rows = torch.arange(num_heads * size)
        order = rows.view(num_heads, 2, size // 2).transpose(1, 2).flatten()
        return tensor.index_select(0, order)

    def _block_of(self, name: str) -> int:
        return int(name.removeprefix(self._blocks).partition(".")[0])
