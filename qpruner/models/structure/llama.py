"""Llama 1-3.x; SmolLM, TinyLlama and Vicuna are of this family."""

from qpruner.models.structure.family import Family

LLAMA = Family("llama", ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"))
