"""Llama 1-3.x (SmolLM, TinyLlama, Vicuna among them) and Mistral, which has the same block."""

from qpruner.models.structure.family import Family

LLAMA = Family("llama", ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"))
MISTRAL = Family("mistral", ("transformers.models.mistral.modeling_mistral", "MistralDecoderLayer"))
