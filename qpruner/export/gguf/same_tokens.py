# ruff: noqa: RUF001
"""Compare the token ids of llama.cpp with the tokenizer's own, on 1,000 texts made here.

Where llama.cpp is known to treat texts otherwise (`deviations`), it gets the text for which both must agree.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from qpruner.export.gguf.vocabulary import pre_tokenizer, space_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TEXTS = 1000
NUM_CHATS = 40
NUM_SPECIAL = 160
LATIN = "the The don't we'LL I'VE naïve 3.14 1234567 0x1F ½ x² Σ ß İ ſ ﬁ café cafe\u0301 q\u0303 ÉcoleÉté"
SCRIPTS = """中文字符 日本語です 한국어 ｱｲｳ שלום مرحبا اَلْعَرَبِيَّةُ ٣٤٥ Привет ПриветМир Ελληνικά ქართული አማርኛ ไทย ก็ हिन्दी
    বাংলা தமிழ் 𝔘𝔫𝔦 𐍈 🦙 👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪 ❤️ 1️⃣ ☃ € №"""
SIGNS = """== != => :: /* */ // ## \"\"\" ''' `x` {} [] () <p> </p> <s> </s> [PAD] <0x0A> $x @y #z %d ... …… !? —–
    \\n \\t && | ~ ^ _ foo_bar camelCase HTMLParser SELECT /usr/bin/env C:\\dir http://a.b/c?d=e&f=1
    me@example.org 192.168.0.1"""
SPACES = ("\u00a0", "\u3000", "\u2009", "\u200b", "\u200d", "\u0085", "\v", "\f", "\u2028", "\ufeff", "\ufffd", "\x7f")
PIECES = (
    *f"{LATIN} {SCRIPTS} {SIGNS}".split(),
    *(
        " ",
        "  ",
        "   ",
        "\t",
        "\t\t",
        "\n",
        "\n\n",
        "\r\n",
        " \n",
        "\n  ",
        "▁",
        "▁▁",
        "Ġ",
        "\u0301",
        "\u202e",
        "\U000f1234",
    ),
    *SPACES,
)
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


class Tokens(Protocol):
    """The part of `llama_cpp.Llama` that is compared."""

    def tokens(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Return the ids of a text."""


def different_tokens(llama: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int], list[int]]]:
    """Compare 1,000 texts; return those whose ids differ, with the ids of llama.cpp and those of the tokenizer."""
    as_served, encode = _treatment(tokenizer)[0], tokenizer.backend_tokenizer.encode
    comparable = (
        (text, asked, is_chat) for text, is_chat in texts(tokenizer) if (asked := as_served(text)) is not None
    )
    found = []
    for text, asked, is_chat in itertools.islice(comparable, NUM_TEXTS):
        theirs = llama.tokens(asked, add_special=not is_chat, parse_special=True)
        ours = encode(text, add_special_tokens=not is_chat).ids
        if ours != theirs:
            found.append((text, theirs, ours))
    return found


def texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Yield texts without end, the same each time, and whether each is a chat (which has its own first token)."""
    randomly = random.Random(0)
    if tokenizer.chat_template:
        yield from ((text, True) for text in _chats(tokenizer, randomly))
    plain = itertools.chain(("", *PIECES, *CODE, *SENTENCES), _with_special(tokenizer, randomly), _mixed(randomly))
    yield from ((text, False) for text in plain)


def deviations(tokenizer: PreTrainedTokenizerBase) -> str:
    """Say which texts get other ids in llama.cpp than from the tokenizer, whatever a GGUF file says; empty: none."""
    return _treatment(tokenizer)[1]


def _treatment(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[str], str | None], str]:
    """Return what is told, and a function: the text from which llama.cpp makes the tokenizer's ids (None: no text)."""
    definition = _without_vocabulary(tokenizer)
    if not definition["model"]["byte_fallback"]:
        if "NFC" in str(definition["normalizer"]):
            told = (
                "llama.cpp does not compose characters (Unicode NFC): text with a letter and its accent apart differs"
            )
            return lambda text: unicodedata.normalize("NFC", text), told
        if pre_tokenizer(definition) in ("tekken", "gpt-4o"):
            told = "llama.cpp splits words at combining marks: text in Hindi or Bengali and some emoji differ"
            return lambda text: None if any(map(_is_mark, text)) else text, told
        return lambda text: text, ""
    where = space_prefix(definition)
    if where == "never" or definition["normalizer"]:
        has_sign = any(set(token) == {"▁"} for token in definition["added"])
        told = "text with the sign ▁ differs, which llama.cpp takes for a space" if has_sign else ""
        return lambda text: None if has_sign and "▁" in text else text, told
    return _metaspace(definition["added"], where == "first", bool(tokenizer.chat_template))


def _without_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what `backend` does but the vocabulary, which takes seconds."""
    used = tokenizer.backend_tokenizer
    model = {"byte_fallback": used.model.byte_fallback, "ignore_merges": used.model.ignore_merges}
    parts = {"normalizer": used.normalizer, "pre_tokenizer": used.pre_tokenizer}
    found = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    return {**found, "model": model, "added": [token.content for token in tokenizer.added_tokens_decoder.values()]}


def _metaspace(tokens: Sequence[str], only_first: bool, is_chatty: bool) -> tuple[Callable[[str], str | None], str]:
    """Treat text for which the tokenizer adds a space before each part, or before the first, that has none."""
    added = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    spaces = (" ", "▁")
    if only_first and is_chatty:

        def with_space(text: str) -> str:
            bare = text and not text.startswith(spaces) and not added.match(text)
            return f" {text}" if bare else text

        return with_space, "llama.cpp adds no space before text that does not begin with a special token, as chats do"

    def without_space(text: str) -> str | None:
        tokens, parts = added.findall(text), added.split(text)
        if any(part in spaces for part in parts) or (only_first and any(parts[1:])):
            return None
        bare = [part[1:] if part.startswith(spaces) else part for part in parts]
        return "".join(part + token for part, token in zip(bare, [*tokens, ""], strict=True))

    return (
        without_space,
        "llama.cpp adds a space before text at the start and after special tokens, even where there is one",
    )


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _mixed(randomly: random.Random) -> Iterator[str]:
    pieces = (*PIECES, *PIECES, *CODE, *SENTENCES)
    while True:
        chosen = randomly.choices(pieces, k=randomly.randint(2, 12))
        yield randomly.choice(("", " ", " ", "\n")).join(chosen)


def _with_special(tokenizer: PreTrainedTokenizerBase, randomly: random.Random) -> Iterator[str]:
    added = sorted(token.content for token in tokenizer.added_tokens_decoder.values())
    around = ("", "", " ", "\n", "Hello", " world ", "é", "日本", "1", ".")
    for _ in range(NUM_SPECIAL if added else 0):
        yield "".join(
            randomly.choice(around) + randomly.choice(added) + randomly.choice(around)
            for _ in range(randomly.randint(1, 3))
        )


def _chats(tokenizer: PreTrainedTokenizerBase, randomly: random.Random) -> Iterator[str]:
    from jinja2 import TemplateError

    for index in range(NUM_CHATS):
        turns = [
            {"role": role, "content": _content(randomly)}
            for _ in range(randomly.randint(1, 4))
            for role in ("user", "assistant")
        ]
        asks = turns[:-1] if index % 2 else turns
        system: list[dict[str, Any]] = [{"role": "system", "content": _content(randomly)}] if index % 3 == 0 else []
        try:
            yield tokenizer.apply_chat_template([*system, *asks], tokenize=False, add_generation_prompt=bool(index % 2))
        except TemplateError:  # Gemma's template, for one, refuses the role `system`.
            yield tokenizer.apply_chat_template(asks, tokenize=False, add_generation_prompt=bool(index % 2))


def _content(randomly: random.Random) -> str:
    return " ".join(randomly.choices(PIECES + CODE + SENTENCES, k=randomly.randint(1, 6)))
