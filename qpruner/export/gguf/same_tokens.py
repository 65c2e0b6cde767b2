# ruff: noqa: RUF001
"""Compare the token ids of llama.cpp with the tokenizer's own, on 1,000 texts made here."""

import itertools
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

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
    (as_served, _), encode = _as_served(tokenizer), tokenizer.backend_tokenizer.encode
    comparable = (
        (each, asked) for each in texts(tokenizer) if (asked := as_served(each[0])) is not None
    )
    with Llama(model) as llama:
        for (text, is_chat), asked in itertools.islice(comparable, NUM_TEXTS):
            theirs = llama.tokens(asked, add_special=not is_chat)
            ours = encode(text, add_special_tokens=not is_chat).ids
            if (
                ours != theirs and max(ours, default=0) < llama.vocab_size
            ):  # the model has no row for others either
                yield text, theirs, ours


def texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Yield texts without end, and whether each is a chat, which has its own first token.

    The texts are the same each time.
    """
    randomly, plain = random.Random(0), (*PIECES, *CODE, *SENTENCES)
    added = sorted(token.content for token in tokenizer.added_tokens_decoder.values())

    def mixed(most: int = 12) -> str:
        chosen = randomly.choices((*PIECES, *plain), k=randomly.randint(2, most))
        chosen = [
            randomly.choice(added) if added and randomly.random() < 0.1 else each for each in chosen
        ]
        return randomly.choice(("", " ", " ", "\n")).join(chosen)

    for index in range(NUM_CHATS if tokenizer.chat_template else 0):
        yield (
            _chat(tokenizer, [mixed(6) for _ in range(randomly.randint(2, 8))], index % 3 == 0),
            True,
        )
    yield from ((text, False) for text in ("", *plain))
    while True:
        yield mixed(), False


def _chat(tokenizer: PreTrainedTokenizerBase, said: list[str], has_system: bool) -> str:
    """Render a chat; if it is the user's turn that is last, it asks for an answer."""
    first = [{"role": "system", "content": said[0]}] if has_system else []
    turns = [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(said[1:])
    ]
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
        if definition["normalizer"]:
            return partial(
                unicodedata.normalize, "NFC"
            ), "letters whose accents are characters of their own (not NFC)"
        if pre_tokenizer(definition) == "tekken":
            has_mark = "words with combining marks (Hindi, Bengali, some emoji)"
            return (
                lambda text: (
                    None if any(unicodedata.category(each)[0] == "M" for each in text) else text
                ),
                has_mark,
            )
        return lambda text: text, None
    where = space_prefix(definition)
    if (
        where == "never" or definition["normalizer"]
    ):  # Gemma has runs of the sign, which is taken for a space
        if not any(set(token) == {"▁"} for token in added):
            return lambda text: text, None
        return lambda text: None if "▁" in text else text, "texts with the sign ▁"
    split = re.compile(
        "|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)"
    ).split
    only_first, spaces = where == "first", (" ", "▁")

    def with_space(text: str) -> str:
        # llama.cpp puts no space before a text, as a chat begins with a special token.
        begin = split(text)[0]
        return f" {text}" if begin and not begin.startswith(spaces) else text

    def alike(text: str) -> str | None:
        # llama.cpp puts a space at the start and after special tokens, even where there is one.
        begin, *others = split(text)
        differs = any(each.startswith(spaces) for each in (begin, *others)) or (
            only_first and any(others)
        )
        return None if differs else text

    if only_first and tokenizer.chat_template:
        return with_space, "texts that are no chat: begin them with a space"
    return (
        alike,
        "texts that begin with a space, or have special tokens and then text"
        if only_first
        else ("texts with a space at the begin or after a special token"),
    )
