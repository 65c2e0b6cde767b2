"""Write a tokenizer into a GGUF file so that llama.cpp's token ids equal the tokenizer's own.

llama.cpp knows pre-tokenizers by name and has their regular expressions compiled in (`src/llama-vocab.cpp`). A name is
chosen by the definition in the tokenizer, never by the name of the model, and a definition it lacks is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.errors import UserError
from qpruner.models.loading import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

INSTEAD = "`--to merged` keeps the tokenizer as it is"
GPT_2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
"""The regular expression of the pre-tokenizer `ByteLevel`."""
DIGITS = "\\p{N}"
_TAIL = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"


def _by_case(suffix: str, digits: str) -> str:
    lead = "[^\\r\\n\\p{L}\\p{N}]?"
    words = f"{lead}{_UPPER}*{_LOWER}+{suffix}|{lead}{_UPPER}+{_LOWER}*{suffix}"
    return f"{words}|{digits}{_TAIL}".replace("[\\r\\n]*", "[\\r\\n/]*")


_DEEPSEEK = (
    "\\p{N}{1,3}",
    "[一-龥\u3040-ゟ\u30a0-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT_2,), False): "gpt-2",
    ((DIGITS, GPT_2), False): "smollm",
    ((f"{_WORDS}\\p{{N}}{{1,3}}{_TAIL}",), True): "llama-bpe",
    ((f"{_WORDS}\\p{{N}}{{1,3}}{_TAIL}",), False): "dbrx",
    ((f"{_WORDS}\\p{{N}}{_TAIL}",), False): "qwen2",
    ((_by_case("", "\\p{N}"),), True): "tekken",
    ((_by_case("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "\\p{N}{1,3}"),), False): "gpt-4o",
    (_DEEPSEEK, False): "deepseek-v3",
}
"""Name of a pre-tokenizer in llama.cpp, by its regular expressions and by whether whole words go before merges."""

_SPECIAL = """
    </s> <EOT> <MID> <PAD> <PRE> <REPO> <SUF> <end_of_turn> <end_of_utterance> <eos> <fim-middle> <fim-pad> <fim-prefix>
    <fim-repo> <fim-suffix> <fim_middle> <fim_pad> <fim_prefix> <fim_suffix> <reponame> <turn|> <|calls|> <|call|>
    <|channel|> <|code_middle|> <|code_prefix|> <|code_suffix|> <|constrain|> <|end_of_text|> <|endoftext|> <|end|>
    <|eom_id|> <|eot_id|> <|file_sep|> <|fim_middle|> <|fim_pad|> <|fim_prefix|> <|fim_repo|> <|fim_suffix|> <|flush|>
    <|im_end|> <|message|> <|middle|> <|prefix|> <|repo_name|> <|return|> <|start|> <|suffix|> <|tool_response>
    <\uff5cend▁of▁sentence\uff5c> <\uff5cfim▁begin\uff5c> <\uff5cfim▁end\uff5c> <\uff5cfim▁hole\uff5c>
    [EOS] [EOT] [PAD] [e~[ _<EOT> ▁<MID> ▁<PRE> ▁<SUF>
"""
TAKEN_FOR_SPECIAL = frozenset(_SPECIAL.split())
"""What llama.cpp takes for one token wherever it is written, if a token has this text (`llama_vocab::impl::load`)."""


class TokenType(IntEnum):
    """The kinds of tokens in a GGUF file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a tokenizer; `merges` is for `gpt2`, `scores` and `space_prefix` are for `llama`."""

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    special_ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | Mapping[str, str] | None
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    space_prefix: bool = False


def add_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a folder; `vocab_size` is the number of rows of the embedding.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    found = vocabulary(load_tokenizer(str(folder)), vocab_size, stop_ids(folder))
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.model == "llama":
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_prefix)
    else:
        writer.add_token_merges(found.merges)
    for name, token in found.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(found.adds_bos)
    writer.add_add_eos_token(found.adds_eos)
    template = found.chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif template:
        writer.add_chat_template([{"name": name, "template": each} for name, each in template.items()])


def vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, stops: Iterable[int] = ()) -> Vocabulary:
    """Translate a tokenizer for llama.cpp; raise `UserError` if llama.cpp has none like it."""
    definition = backend(tokenizer)
    is_spm = definition["model"]["type"] == "BPE" and definition["model"]["byte_fallback"]
    check_added(definition)
    _check_bytes(definition, is_spm)
    special, adds_bos, adds_eos = _special(tokenizer, stops)
    tokens, types = _tokens(definition, vocab_size, is_spm)
    for text in _only_looking_special(tokenizer, definition, set(special.values())):
        index = definition["model"]["vocab"][text]
        tokens[index], types[index] = _unused(index), TokenType.UNUSED
    shared: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special_ids": {name: each for name, each in special.items() if each < vocab_size},
        "adds_bos": adds_bos,
        "adds_eos": adds_eos,
        "chat_template": tokenizer.chat_template,
    }
    if not is_spm:
        merges = [" ".join(pair) for pair in _merges(definition)]
        return Vocabulary("gpt2", pre_tokenizer(definition), merges=merges, **shared)
    prefix = space_prefix(definition) == "always" or (
        space_prefix(definition) == "first" and not tokenizer.chat_template
    )
    return Vocabulary("llama", "default", scores=_scores(definition, tokens), space_prefix=prefix, **shared)


def backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the definition that is really used: transformers builds some tokenizers anew when it loads them."""
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer is a {type(tokenizer).__name__} without `tokenizer.json`, and only fast tokenizers can be "
            f"written to GGUF; {INSTEAD}"
        )
    definition: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    problems = {
        "model.type": model["type"] if model["type"] != "BPE" else None,
        "model.dropout": model.get("dropout"),
        "model.continuing_subword_prefix": model.get("continuing_subword_prefix"),
        "model.end_of_word_suffix": model.get("end_of_word_suffix"),
    }
    for key, value in problems.items():
        if value:
            raise _unknown(key, value, "byte-level BPE, and BPE with byte fallback (Llama 2, Mistral, Gemma)")
    model["byte_fallback"] = model.get("byte_fallback", False)
    return definition


def pre_tokenizer(definition: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level BPE."""
    if _flat(definition["normalizer"], "normalizers") not in ([], [{"type": "NFC"}]):
        raise _unknown("normalizer", definition["normalizer"], "none, and NFC")
    steps = _flat(definition["pre_tokenizer"], "pretokenizers")
    expressions = tuple(expression for step in steps for expression in _expressions(step))
    key = (expressions, bool(definition["model"].get("ignore_merges")))
    is_byte_level = bool(steps) and steps[-1]["type"] == "ByteLevel"
    if key not in PRE_TOKENIZERS or not is_byte_level or any(step["type"] == "ByteLevel" for step in steps[:-1]):
        raise _unknown("pre_tokenizer", [*steps, {"ignore_merges": key[1]}], ", ".join(PRE_TOKENIZERS.values()))
    return PRE_TOKENIZERS[key]


def space_prefix(definition: Mapping[str, Any]) -> str:
    """Return where a BPE with byte fallback puts a space before text: `always`, `never`, or `first` (start only)."""
    steps = [_flat(definition["normalizer"], "normalizers"), _flat(definition["pre_tokenizer"], "pretokenizers")]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    # Without effect, as no space is left.
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    match steps:
        case [[{"type": "Prepend", "prepend": "▁"}, last], []] if last == space:
            return "always"
        case [[only], rest] if only == space and rest in ([], [split]):
            return "never"
        case [[], [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]]:
            return str(scheme)
    raise _unknown("normalizer and pre_tokenizer", steps, "those of Llama 2, Mistral and Gemma")


def stop_ids(folder: Path) -> list[int]:
    """Return the ids at which generation ends, by `generation_config.json` or else `config.json`."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def check_added(definition: Mapping[str, Any]) -> None:
    """Refuse added tokens that take the spaces around them, which a GGUF file cannot say."""
    odd = [
        token["content"]
        for token in definition["added_tokens"]
        if token["single_word"] or token["lstrip"] or token["rstrip"]
    ]
    if odd:
        raise _unknown("added_tokens", odd, "those without `lstrip`, `rstrip` and `single_word`")


def _unknown(key: str, value: Any, known: str) -> UserError:
    found = json.dumps(value, ensure_ascii=False)
    return UserError(f"llama.cpp cannot do what `{key}` of the tokenizer says: {found}; known are {known}; {INSTEAD}")


def _flat(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [each for inner in step[key] for each in _flat(inner, key)] if step["type"] == "Sequence" else [step]


def _expressions(step: Mapping[str, Any]) -> list[str]:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses}:
            return [GPT_2] if uses else []
        case {"type": "Digits", "individual_digits": True}:
            return [DIGITS]
        # Every expression above matches all of a text, so that nothing lies between what it matches.
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            return [expression]
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Removed", "invert": True}:
            return [expression]
    return [json.dumps(step)]


def _tokens(definition: Mapping[str, Any], vocab_size: int, is_spm: bool) -> tuple[list[str], list[int]]:
    tokens = [_unused(index) for index in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    model = definition["model"]
    for text, index in model["vocab"].items():
        if index < vocab_size:
            tokens[index], types[index] = text, TokenType.NORMAL
            if is_spm and len(text) == 6 and text.startswith("<0x"):
                types[index] = TokenType.BYTE
    for added in definition["added_tokens"]:
        index, text = added["id"], added["content"]
        # A row that the embedding lacks cannot be a token: Gemma 3 has one such, for pictures.
        if index >= vocab_size:
            continue
        # llama.cpp prints other kinds of tokens with this sign in place of the space.
        if is_spm and not added["special"] and "▁" in text:
            continue
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[index], types[index] = text, TokenType.UNKNOWN if is_spm and text == "<unk>" else kind
    if len(set(tokens)) != len(tokens):
        twice = sorted({token for token in tokens if tokens.count(token) > 1})[:5]
        raise _unknown("tokens", twice, "those that occur once")
    return tokens, types


def _unused(index: int) -> str:
    return f"[PAD{index}]"


def _only_looking_special(
    tokenizer: PreTrainedTokenizerBase, definition: Mapping[str, Any], special: set[int]
) -> list[str]:
    """Return plain tokens that no text becomes, but that llama.cpp would find: `</s>` of Qwen and Gemma."""
    plain = set(definition["model"]["vocab"]) - {token["content"] for token in definition["added_tokens"]}
    looking = {text: definition["model"]["vocab"][text] for text in TAKEN_FOR_SPECIAL & plain}
    encode = tokenizer.backend_tokenizer.encode
    return [
        text
        for text, index in looking.items()
        if index not in special and index not in encode(text, add_special_tokens=False).ids
    ]


def _check_bytes(definition: Mapping[str, Any], is_spm: bool) -> None:
    """Without an unknown token, both leave a byte out that has no token: the tokenizer of SmolLM2 lacks 12."""
    known, missing = definition["model"]["vocab"], []
    if is_spm:
        missing = [name for byte in range(256) if (name := f"<0x{byte:02X}>") not in known and chr(byte) not in known]
    elif definition["model"]["unk_token"]:
        from tokenizers.pre_tokenizers import ByteLevel

        missing = sorted(set(ByteLevel.alphabet()) - set(known))
    if missing:
        raise _unknown("model.vocab", missing[:5], "those with all 256 bytes")


def _merges(definition: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in definition["model"]["merges"]]


def _scores(definition: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Rank tokens by the first merge that makes them: llama.cpp joins the pair whose token has the highest score."""
    rank: dict[str, int] = {}
    merges, known = _merges(definition), definition["model"]["vocab"]
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    merged = set(merges)
    for text in known:
        halves = ((text[:at], text[at:]) for at in range(1, len(text)))
        missing = next((pair for pair in halves if pair not in merged and pair[0] in known and pair[1] in known), None)
        if missing:
            raise _unknown("model.merges", {"lacks": missing}, "those with every pair of tokens that make a token")
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _special(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int]) -> tuple[dict[str, int], bool, bool]:
    """Return special ids, and whether texts get a first and a last token: by what the tokenizer does with no text."""
    around = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    text = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    at = next(index for index in range(len(around)) if around[index : index + len(text)] == text)
    before, after = around[:at], around[at + len(text) :]
    if len(before) > 1 or len(after) > 1:
        raise _unknown("post_processor", around, "one token before a text and one after it")
    ends = [*after, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *stops]
    if not ends:
        raise UserError(f"the tokenizer has no `eos_token`, so llama.cpp would never stop: set one; {INSTEAD}")
    ends = list(dict.fromkeys(ends))
    found = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    # Without one, llama.cpp takes token 11; this one is not put before texts.
    begins = [*before, *([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), ends[0]]
    found["bos"] = begins[0]
    for name in ("unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            found[name] = token
    return found, bool(before), bool(after)
