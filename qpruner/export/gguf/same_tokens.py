# ruff: noqa: RUF001
"""Compare the token ids of llama.cpp with the tokenizer's own, on 1,000 texts made here."""

import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qpruner.export.gguf.llama_cpp import Llama
from qpruner.export.gguf.vocabulary import backend, pre_tokenizer, space_prefix
from qpruner.models.loading import load_tokenizer

NUM_TEXTS = 1000
NUM_CHATS = 40
LATIN = (
    "the The don't we'LL I'VE naïve 3.14 1234567 0x1F ½ x² Σ ß İ ſ ﬁ café cafe\u0301 q\u0303 "
    "ÉcoleÉté"
)
SCRIPTS = """中文字符 日本語です 한국어 ｱｲｳ שלום مرحبا اَلْعَرَبِيَّةُ ٣٤٥ Привет ПриветМир
    Ελληνικά ქართული አማርኛ ไทย ก็ हिन्दी বাংলা தமிழ் 𝔘𝔫𝔦 𐍈 🦙 👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪 ❤️
    1️⃣ ☃ € №"""
SIGNS = """== != => :: /* */ // ## \"\"\" ''' `x` {} [] () <p> </p> <s> </s> [PAD] <0x0A> $x @y #z
    %d ... …… !? —– \\n \\t && | ~ ^ _ foo_bar camelCase HTMLParser SELECT /usr/bin/env
    C:\\dir http://a.b/c?d=e&f=1 me@example.org 192.168.0.1"""
SPACES = (
    " |  |   |\t|\t\t|\n|\n\n|\r\n| \n|\n  "
    "|\u00a0|\u3000|\u2009|\u0085|\v|\f|\u2028|\u200b|\u200d|\ufeff"
)
ODD = "▁ ▁▁ Ġ \u0301 \u202e \ufffd \x7f \U000f1234"
PIECES = (*f"{LATIN} {SCRIPTS} {SIGNS} {ODD}".split(), *SPACES.split("|"))
CODE = (
    "def f(x: int) -> str:\n    return f'{x:>10}'  # note\n\n\nclass A(B):\n\tpass\n",
    "for (int i = 0; i < n; ++i) {\r\n\ta[i] *= 2;\r\n}\r\n",
    '{"key": [1, 2.5e-10, null], "ключ": "значение"}\n',
    "<html>\n  <body class='x'>&nbsp;</body>\n</html>",
    "SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%';  -- end",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n* item\n    1. nested\n",
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "Question: What boils at 100 °C?\nAnswer: water",
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "敏捷的棕色狐狸跳过了懒狗。私はガラスを食べられます。",
    "Любя, съешь щипцы, — вздохнёт мэр, — кайф жгуч.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "👩🏽‍🚀🚀 we're GO!!! 10,000,000 km — 50% off\t\t",
)


def token_differences(model: Path, folder: Path) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield texts whose token ids differ, with the ids of llama.cpp and those of the tokenizer.

    `model` is a GGUF file, `folder` has the tokenizer.
    """
    tokenizer = load_tokenizer(str(folder))
    encode = tokenizer.backend_tokenizer.encode
    as_served, _ = _as_served(tokenizer)
    num_compared = 0
    with Llama(model) as llama:
        for text, is_chat in texts(tokenizer):
            served_text = as_served(text)
            if served_text is None:
                continue
            theirs = llama.tokens(served_text, add_special=not is_chat)
            ours = encode(text, add_special_tokens=not is_chat).ids
            # The model has no row for larger ids either.
            if ours != theirs and max(ours, default=0) < llama.vocab_size:
                yield text, theirs, ours
            num_compared += 1
            if num_compared == NUM_TEXTS:
                return


def texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Yield texts without end, and whether each is a chat, which has its own first token.

    The texts are the same each time.
    """
    randomly = random.Random(0)
    plain = (*PIECES, *CODE, *SENTENCES)
    added = sorted(token.content for token in tokenizer.added_tokens_decoder.values())

    def part(piece: str) -> str:
        return randomly.choice(added) if added and randomly.random() < 0.1 else piece

    def mixed(most: int = 12) -> str:
        pieces = randomly.choices((*PIECES, *plain), k=randomly.randint(2, most))
        parts = [part(piece) for piece in pieces]
        return randomly.choice(("", " ", " ", "\n")).join(parts)

    if tokenizer.chat_template:
        for index in range(NUM_CHATS):
            said = [mixed(6) for _ in range(randomly.randint(2, 8))]
            yield _chat(tokenizer, said, has_system=index % 3 == 0), True
    for text in ("", *plain):
        yield text, False
    while True:
        yield mixed(), False


def _chat(tokenizer: PreTrainedTokenizerBase, said: list[str], has_system: bool) -> str:
    """Render a chat; if it is the user's turn that is last, it asks for an answer."""
    turns = []
    for index, text in enumerate(said[1:]):
        role = "assistant" if index % 2 else "user"
        turns.append({"role": role, "content": text})
    first = [{"role": "system", "content": said[0]}] if has_system else []
    options = {"tokenize": False, "add_generation_prompt": len(turns) % 2 == 1}
    try:
        return str(tokenizer.apply_chat_template([*first, *turns], **options))
    except TemplateError:  # Gemma's template, for one, refuses the role `system`.
        return str(tokenizer.apply_chat_template(turns, **options))


def remark(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Say of which texts llama.cpp makes other tokens; None if of none."""
    _, differing = _as_served(tokenizer)
    return f"llama.cpp makes other tokens of {differing}" if differing else None


def _as_served(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Callable[[str], str | None], str | None]:
    """Return a function that gives the text of which llama.cpp makes the tokenizer's ids.

    The function returns None for a text of which llama.cpp makes other ids. The second value names
    the texts that change or differ; llama.cpp differs in nothing else.
    """
    definition = backend(tokenizer)
    added = [token["content"] for token in definition["added_tokens"]]
    if not definition["model"]["byte_fallback"]:
        return _byte_level_as_served(definition)
    where = space_prefix(definition)
    if where == "never" or definition["normalizer"]:
        # Gemma has runs of the sign, which is taken for a space.
        if any(set(token) == {"▁"} for token in added):
            return (lambda text: None if "▁" in text else text), "texts with the sign ▁"
        return _unchanged, None

    longest_first = sorted(added, key=len, reverse=True)
    split = re.compile("|".join(map(re.escape, longest_first)) or "(?!)").split
    spaces = (" ", "▁")

    def with_space(text: str) -> str:
        # llama.cpp puts no space before a text, as a chat begins with a special token.
        begin = split(text)[0]
        return f" {text}" if begin and not begin.startswith(spaces) else text

    def alike(text: str) -> str | None:
        # llama.cpp puts a space at the start and after special tokens, even where there is one.
        parts = split(text)
        if any(part.startswith(spaces) for part in parts):
            return None
        return None if where == "first" and any(parts[1:]) else text

    if where != "first":
        return alike, "texts with a space at the begin or after a special token"
    if tokenizer.chat_template:
        return with_space, "texts that are no chat: begin them with a space"
    return alike, "texts that begin with a space, or have special tokens and then text"


def _byte_level_as_served(
    definition: Mapping[str, Any],
) -> tuple[Callable[[str], str | None], str | None]:
    """Return what `_as_served` does, for a byte-level BPE."""
    if definition["normalizer"]:
        differing = "letters whose accents are characters of their own (not NFC)"
        return partial(unicodedata.normalize, "NFC"), differing
    if pre_tokenizer(definition) == "tekken":
        return _without_marks, "words with combining marks (Hindi, Bengali, some emoji)"
    return _unchanged, None


def _without_marks(text: str) -> str | None:
    has_mark = any(unicodedata.category(character)[0] == "M" for character in text)
    return None if has_mark else text


def _unchanged(text: str) -> str | None:
    return text
