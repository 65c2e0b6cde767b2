"""Llama 1 to 3.x, and models of the same architecture: SmolLM, TinyLlama, Vicuna."""

from qpruner.models.families.family import DividedFamily

LLAMA = DividedFamily("llama", "LlamaDecoderLayer", gguf="llama", gguf_ragged="deci")
