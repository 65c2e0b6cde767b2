"""Llama 1-3.x; SmolLM, TinyLlama and Vicuna are of this family."""

from qpruner.models.families.family import DividedFamily

LLAMA = DividedFamily("llama", ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"))
