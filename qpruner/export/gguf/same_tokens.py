# ruff: noqa: RUF001
"""Compare the token ids of llama.cpp with the tokenizer's own, on 1,000 texts made here.

Where llama.cpp is known to treat texts otherwise (`deviations`), it gets the text for which both must agree.
"""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from qpruner.export.gguf.vocabulary import backend, space_prefix

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
    """Return the texts whose ids differ, with the ids of llama.cpp and those of the tokenizer."""
    as_served = served(tokenizer)
    found = []
    for text, is_chat in texts(tokenizer):
        asked = as_served(text)
        if asked is None:
            continue
        theirs = llama.tokens(asked, add_special=not is_chat, parse_special=True)
        ours = tokenizer.backend_tokenizer.encode(text, add_special_tokens=not is_chat).ids
        if ours != theirs:
            found.append((text, theirs, ours))
    return found


def texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Yield 1,000 texts, the same each time, and whether each is a rendered chat (which has its own first token)."""
    randomly = random.Random(0)
    chats = list(_chats(tokenizer, randomly)) if tokenizer.chat_template else []
    yield from ((text, True) for text in chats)
    plain = itertools.chain(("", *PIECES, *CODE, *SENTENCES), _with_special(tokenizer, randomly), _mixed(randomly))
    yield from ((text, False) for text in itertools.islice(plain, NUM_TEXTS - len(chats)))


def served(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str | None]:
    """Return a function that gives the text from which llama.cpp must make the tokenizer's ids; None: there is none."""
    definition = backend(tokenizer)
    if not definition["model"]["byte_fallback"]:
        is_nfc = "NFC" in str(definition["normalizer"])
        return lambda text: unicodedata.normalize("NFC", text) if is_nfc else text
    where, is_chatty = space_prefix(definition), bool(tokenizer.chat_template)
    if where == "never" or definition["normalizer"]:
        return lambda text: text
    added = "|".join(re.escape(token["content"]) for token in definition["added_tokens"])
    starts, has_prefix_inside = re.compile(f"(^|{added})[ ▁]"), re.compile(f"({added})(?!$|{added})")
    one_space = re.compile(f"(^|{added})[ ▁]($|{added})")
    if where == "always":
        return lambda text: None if one_space.search(text) else starts.sub(r"\1", text)
    if is_chatty:
        return lambda text: text if re.match(f"$|[ ▁]|{added}", text) else f" {text}"
    return lambda text: None if has_prefix_inside.search(text) else re.sub("^[ ▁]", "", text)


def deviations(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Say which texts get other ids in llama.cpp than from the tokenizer, whatever a GGUF file says."""
    definition = backend(tokenizer)
    if "NFC" in str(definition["normalizer"]):
        return ["llama.cpp does not normalize text: characters that are not composed (Unicode NFC) get other ids"]
    if not definition["model"]["byte_fallback"] or definition["normalizer"]:
        return []
    if space_prefix(definition) == "always":
        return ["llama.cpp adds a space before text at the start and after special tokens even where it has one"]
    if space_prefix(definition) == "first":
        if tokenizer.chat_template:
            return ["llama.cpp adds no space before text that does not begin with a special token"]
        return ["llama.cpp adds a space before text also after special tokens"]
    return []


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
