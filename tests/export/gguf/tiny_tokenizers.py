"""Train small tokenizers of the kinds that llama.cpp knows, and write them as GGUF files with a
minimal model."""

import ctypes
from pathlib import Path
from typing import Any

from conftest import demo_rows
from safetensors.torch import save_file
from same_tokens import PIECES
from tiny_families import family_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from qpruner.export.gguf import llama_cpp
from qpruner.export.gguf.llama_cpp import Llama
from qpruner.export.gguf.vocabulary import PRE_TOKENIZERS
from qpruner.export.gguf.writing import write_gguf

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXPRESSIONS = {name: key for key, name in PRE_TOKENIZERS.items()}
SPACES = {
    "always, normalizer": ([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")], None),
    "always": ([], pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "first": ([], pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "never": ([normalizers.Replace(" ", "▁")], pre_tokenizers.Split(" ", "merged_with_previous")),
}


def corpus() -> list[str]:
    questions = [
        f"{row['question']} {' '.join(row['choices']['text'])}"
        for row in demo_rows("questions_train.jsonl")
    ]
    return [
        *questions,
        *(f"{first} {second}" for first, second in zip(PIECES, reversed(PIECES), strict=True)),
    ] * 2


def byte_level(name: str) -> Tokenizer:
    """Train a byte-level BPE with the pre-tokenizer that llama.cpp calls so."""
    expressions, ignores_merges = EXPRESSIONS[name]
    trained = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    trained.normalizer = normalizers.NFC() if name == "qwen2" else None
    # As the tokenizers in use say it: the expression of GPT-2 and the digits have steps of their
    # own.
    steps: list[Any] = [pre_tokenizers.Split(Regex(each), "isolated") for each in expressions]
    if name in ("gpt-2", "smollm"):
        steps = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    is_gpt_2 = name in ("gpt-2", "smollm")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt_2)]
    )
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return trained


def sentencepiece(spaces: str) -> Tokenizer:
    """Train a BPE with byte fallback, and give it all pairs that make a token, as those of
    SentencePiece have them."""
    steps, splitter = SPACES[spaces]
    first = Tokenizer(models.BPE())
    first.normalizer = normalizers.Replace(" ", "▁")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    first.train_from_iterator(
        [line[:60] for line in corpus()],
        trainers.BpeTrainer(
            vocab_size=1100,
            special_tokens=[*SPECIAL, *bytes_],
            limit_alphabet=120,
            show_progress=False,
        ),
    )
    vocabulary = first.get_vocab()
    pairs = [
        (token[:at], token[at:])
        for token in sorted(
            set(vocabulary) - set(SPECIAL) - set(bytes_), key=vocabulary.__getitem__
        )
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    model = models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    trained = Tokenizer(model)
    trained.normalizer = normalizers.Sequence(steps) if steps else None
    trained.pre_tokenizer = splitter
    trained.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in SPECIAL]
    )
    return trained


def saved(trained: Tokenizer, folder: Path, chat_template: Any = None, **others: Any) -> Path:
    names = {"bos_token": "<s>", "eos_token": "</s>"} | others
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, **names)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def piece(llama: Llama, token: int) -> bytes:
    buffer = ctypes.create_string_buffer(1024)
    function = ctypes.CDLL(str(llama_cpp.library_path())).llama_token_to_piece
    count = function(ctypes.c_void_p(llama._vocab), token, buffer, len(buffer), 0, True)
    return buffer.raw[:count]


def vocabulary_file(folder: Path, vocab_size: int) -> Path:
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = family_model("llama", vocab_size=vocab_size, num_hidden_layers=1, **ends)
    model.config.save_pretrained(folder)
    tensors = {name: each for name, each in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")
    write_gguf(folder, folder / "vocabulary.gguf", "tiny")
    return folder / "vocabulary.gguf"
