"""Write tiny models of all families as GGUF files, and compare llama.cpp's logits with those of
transformers."""

import shutil
from pathlib import Path
from typing import Any

import torch
from made_tensors import distance, token_rows
from tiny_families import family_model, kept_of
from transformers import PreTrainedModel

from qpruner.export.gguf.llama_cpp import Llama
from qpruner.export.gguf.writing import write_gguf
from qpruner.pruning.surgery import cut, keep_blocks

GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_implementation": "eager",
    "tie_word_embeddings": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "gemma2": GEMMA | {"query_pre_attn_scalar": 14},
    "gemma3_text": GEMMA,
}
(IDS,) = token_rows(1, 24, 5, 512)
MOST_ERROR = 4e-3
"""Largest relative error of logits. llama.cpp keeps keys and values in float16, and has a table of
GELU in it: 0.0003 to 0.0018 here with xllamacpp, to 0.0032 with node-llama-cpp's AVX-512
(2026-11-29)."""


def built(kind: str, name: str, **others: Any) -> PreTrainedModel:
    """Build a model with a vocabulary of 512: alike, ragged, with a block dropped, ..."""
    options = {"vocab_size": 512} | OPTIONS.get(name, {}) | others
    model = family_model(name, **options)
    if "dropped" in kind:
        model = keep_blocks(model, [1, 2])
    if "ragged" in kind:
        model = cut(model, {0: kept_of(name)[0]})
    if "uniform" in kind:
        model = cut(model, dict.fromkeys(range(3), kept_of(name)[0]))
    return model.eval()


def saved(model: PreTrainedModel, tokenizer: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def written(model: PreTrainedModel, tokenizer: Path, folder: Path) -> Path:
    write_gguf(saved(model, tokenizer, folder), folder / "model.gguf", "tiny")
    return folder / "model.gguf"


def error_of(file: Path, model: Any, adapter: Path | None = None, num_tokens: int = 0) -> float:
    """Return the relative error of llama.cpp's logits; check that both continue by the same
    `num_tokens` tokens."""
    with Llama(file, adapter) as llama:
        logits = torch.from_numpy(llama.logits(IDS))
        llama.prefill(IDS)
        assert llama.decode(num_tokens) == continued(model, IDS, num_tokens)
    with torch.no_grad():
        return distance(logits, model(torch.tensor([IDS])).logits[0])


def continued(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    if not num_tokens:
        return []
    model.generation_config.eos_token_id = None
    made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False)
    found: list[int] = made[0, len(ids) :].tolist()
    return found
