"""A random Llama of two blocks as a GGUF file, and an adapter for it, written with the package `gguf` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy

HIDDEN, HEADS, CHANNELS, RANK = 64, 4, 128, 4
SPECIAL = ("<s>", "</s>")


def _bytes_as_text() -> list[str]:
    """The characters that byte-level BPE has for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def write_small(file: Path, tensor: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16) -> Path:
    """Write the model; its vocabulary is the 256 bytes and two special tokens."""
    random = numpy.random.default_rng(0)
    writer: Any = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(CHANNELS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*SPECIAL, *_bytes_as_text()])
    writer.add_token_types([3, 3, *[1] * 256])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    shapes = {"token_embd": (258, HIDDEN), "output": (258, HIDDEN), "output_norm": (HIDDEN,)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{name}": (CHANNELS, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"blk.{block}.ffn_down": (HIDDEN, CHANNELS)}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(numpy.float32) * 0.2
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", numpy.ones(shape, numpy.float32))
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, tensor), raw_dtype=tensor)
    return _finish(writer, file)


def write_small_adapter(file: Path) -> Path:
    """Write an adapter of the second block's value projection."""
    random = numpy.random.default_rng(1)
    writer: Any = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, shape in {"lora_a": (RANK, HIDDEN), "lora_b": (HIDDEN, RANK)}.items():
        writer.add_tensor(f"blk.1.attn_v.weight.{name}", random.standard_normal(shape).astype(numpy.float32))
    return _finish(writer, file)


def _finish(writer: Any, file: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
