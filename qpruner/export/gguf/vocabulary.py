"""Write a tokenizer into a GGUF file so that llama.cpp's token ids equal the tokenizer's own.

llama.cpp knows pre-tokenizers by name and has their regular expressions compiled in
(`src/llama-vocab.cpp`). A name is chosen by the definition in the tokenizer, never by the name of
the model, and a definition it lacks is refused.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from qpruner.errors import UserError

INSTEAD = "`--to merged` keeps the tokenizer as it is"
GPT_2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
"""The regular expression of the pre-tokenizer `ByteLevel`."""
TAKING_SPACES = ("lstrip", "rstrip", "single_word")
"""Keys of added tokens that take the spaces around them, which a GGUF file cannot say."""
DIGITS = "\\p{N}"
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_BY_CASE = "|".join(
    f"[^\\r\\n\\p{{L}}\\p{{N}}]?{each}" for each in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
)
_SPACES = "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT_2,), False): "gpt-2",
    ((DIGITS, GPT_2), False): "smollm",
    ((f"{_WORDS}\\p{{N}}{{1,3}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*{_SPACES}",), True): "llama-bpe",
    ((f"{_WORDS}\\p{{N}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*{_SPACES}",), False): "qwen2",
    ((f"{_BY_CASE}|\\p{{N}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*{_SPACES}",), True): "tekken",
}
"""Name of a pre-tokenizer in llama.cpp, by its regular expressions and by whether whole words go
before merges."""

_SPECIAL = """
    </s> <EOT> <MID> <PAD> <PRE> <REPO> <SUF> <end_of_turn> <end_of_utterance> <eos> <fim-middle>
    <fim-pad> <fim-prefix> <fim-repo> <fim-suffix> <fim_middle> <fim_pad> <fim_prefix>
    <fim_suffix> <reponame> <turn|> <|calls|> <|call|> <|channel|> <|code_middle|> <|code_prefix|>
    <|code_suffix|> <|constrain|> <|end_of_text|> <|endoftext|> <|end|> <|eom_id|> <|eot_id|>
    <|file_sep|> <|fim_middle|> <|fim_pad|> <|fim_prefix|> <|fim_repo|> <|fim_suffix|> <|flush|>
    <|im_end|> <|message|> <|middle|> <|prefix|> <|repo_name|> <|return|> <|start|> <|suffix|>
    <|tool_response> <\uff5cend▁of▁sentence\uff5c> <\uff5cfim▁begin\uff5c> <\uff5cfim▁end\uff5c>
    <\uff5cfim▁hole\uff5c> [EOS] [EOT] [PAD] [e~[ _<EOT> ▁<MID> ▁<PRE> ▁<SUF>
"""
TAKEN_FOR_SPECIAL = frozenset(_SPECIAL.split())
"""What llama.cpp takes for one token wherever it is written, if a token has this text
(`llama_vocab::impl::load`)."""


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, stops: Iterable[int] = ()
) -> dict[str, Any]:
    """Translate a tokenizer for llama.cpp.

    Args:
        tokenizer: A fast tokenizer.
        vocab_size: Number of rows of the embeddings.
        stops: Ids at which generation ends, beside the tokenizer's own.

    Returns:
        The values for the methods `add_<key>` of the writer.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    definition = backend(tokenizer)
    is_spm = definition["model"]["byte_fallback"]
    if odd := [
        each["content"] for each in definition["added_tokens"] if any(map(each.get, TAKING_SPACES))
    ]:
        raise _unknown("added_tokens", odd, f"those without {', '.join(TAKING_SPACES)}")
    _check_bytes(definition, is_spm)
    special, adds = _special(tokenizer, stops)
    tokens, types = _tokens(tokenizer, definition, vocab_size, set(special.values()))
    found: dict[str, Any] = {name: value for name, value in special.items() if value < vocab_size}
    found |= adds | {"token_list": tokens, "token_types": types}
    if is_spm:
        where = space_prefix(definition)
        adds_space = where == "always" or (where == "first" and not tokenizer.chat_template)
        found |= {
            "tokenizer_model": "llama",
            "tokenizer_pre": "default",
            "add_space_prefix": adds_space,
        }
        found["token_scores"] = _scores(definition, tokens)
    else:
        merges = [" ".join(pair) for pair in _merges(definition)]
        found |= {
            "tokenizer_model": "gpt2",
            "tokenizer_pre": pre_tokenizer(definition),
            "token_merges": merges,
        }
    if isinstance(template := tokenizer.chat_template, Mapping):
        template = [{"name": name, "template": each} for name, each in template.items()]
    return found | ({"chat_template": template} if template else {})


def backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the definition of a tokenizer that is really used.

    transformers builds some tokenizers anew when it loads them.
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise UserError(
            f"the tokenizer is a {kind} without `tokenizer.json`, only fast ones are written; "
            f"{INSTEAD}"
        )
    definition: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    for key in ("type", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if (model.get(key) or None) not in (None, "BPE"):
            raise _unknown(
                f"model.{key}",
                model[key],
                "byte-level BPE, and BPE with byte fallback (Llama 2, Gemma)",
            )
    model["byte_fallback"] = model.get("byte_fallback", False)
    return definition


def pre_tokenizer(definition: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level BPE."""
    if _flat(definition["normalizer"], "normalizers") not in ([], [{"type": "NFC"}]):
        raise _unknown("normalizer", definition["normalizer"], "none, and NFC")
    steps = _flat(definition["pre_tokenizer"], "pretokenizers")
    expressions = tuple(expression for step in steps for expression in _expressions(step))
    key = (expressions, bool(definition["model"].get("ignore_merges")))
    places = [place for place, step in enumerate(steps) if step["type"] == "ByteLevel"]
    if key not in PRE_TOKENIZERS or places != [len(steps) - 1]:
        raise _unknown(
            "pre_tokenizer", [*steps, {"ignore_merges": key[1]}], ", ".join(PRE_TOKENIZERS.values())
        )
    return PRE_TOKENIZERS[key]


def space_prefix(definition: Mapping[str, Any]) -> str:
    """Return where a BPE with byte fallback puts a space before text.

    This is `always`, `never`, or `first` (at the start only).
    """
    steps = [
        _flat(definition["normalizer"], "normalizers"),
        _flat(definition["pre_tokenizer"], "pretokenizers"),
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    # Without effect, as no space is left.
    split = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    match steps:
        case [[{"type": "Prepend", "prepend": "▁"}, last], []] if last == space:
            return "always"
        case [[only], rest] if only == space and rest in ([], [split]):
            return "never"
        case [
            [],
            [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}],
        ]:
            return str(scheme)
    raise _unknown("normalizer and pre_tokenizer", steps, "those of Llama 2, Mistral and Gemma")


def stop_ids(folder: Path) -> list[int]:
    """Return the ids at which generation ends.

    They are in `generation_config.json`, or else in `config.json`.
    """
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def _unknown(key: str, value: Any, known: str) -> UserError:
    found = json.dumps(value, ensure_ascii=False)
    return UserError(
        f"llama.cpp cannot do what `{key}` of the tokenizer says: {found}; known are {known}; "
        f"{INSTEAD}"
    )


def _flat(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return (
        [each for inner in step[key] for each in _flat(inner, key)]
        if step["type"] == "Sequence"
        else [step]
    )


def _expressions(step: Mapping[str, Any]) -> list[str]:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses}:
            return [GPT_2] if uses else []
        case {"type": "Digits", "individual_digits": True}:
            return [DIGITS]
        # Every expression above matches all of a text, so that nothing lies between what it
        # matches.
        case {
            "type": "Split",
            "pattern": {"Regex": expression},
            "behavior": "Isolated",
            "invert": False,
        }:
            return [expression]
        case {
            "type": "Split",
            "pattern": {"Regex": expression},
            "behavior": "Removed",
            "invert": True,
        }:
            return [expression]
    return [json.dumps(step)]


def _tokens(
    tokenizer: PreTrainedTokenizerBase,
    definition: Mapping[str, Any],
    vocab_size: int,
    special: set[int],
) -> tuple[list[str], list[int]]:
    """List the text and the type of each row; `special` are ids that the file names."""
    tokens, types = (
        [f"[PAD{index}]" for index in range(vocab_size)],
        [int(TokenType.UNUSED)] * vocab_size,
    )
    known, is_spm = definition["model"]["vocab"], definition["model"]["byte_fallback"]
    added = {token["content"] for token in definition["added_tokens"]}

    def is_lost(text: str) -> bool:
        """Return True for a plain token that no text becomes, but that llama.cpp would find.

        The token `</s>` of Qwen is one.
        """
        if text not in TAKEN_FOR_SPECIAL or text in added or known[text] in special:
            return False
        return (
            known[text]
            not in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        )

    for text, index in known.items():
        if index < vocab_size and not is_lost(text):
            is_byte = is_spm and len(text) == 6 and text.startswith("<0x")
            tokens[index], types[index] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for token in definition["added_tokens"]:
        index, text = token["id"], token["content"]
        # Gemma 3 has a token for pictures that its embedding lacks. With the sign of a space only
        # plain tokens are printed as a space.
        if index < vocab_size and (token["special"] or not is_spm or "▁" not in text):
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            tokens[index], types[index] = (
                text,
                TokenType.UNKNOWN if is_spm and text == "<unk>" else kind,
            )
    if len(set(tokens)) != len(tokens):
        twice = sorted(token for token, count in Counter(tokens).items() if count > 1)[:5]
        raise _unknown("tokens", twice, "those that occur once")
    return tokens, types


def _check_bytes(definition: Mapping[str, Any], is_spm: bool) -> None:
    """Refuse a byte without a token if the tokenizer has an unknown token.

    Without one, both programs leave such a byte out: the tokenizer of SmolLM2 lacks 12.
    """
    known, missing = definition["model"]["vocab"], []
    if is_spm:
        missing = [
            name
            for byte in range(256)
            if (name := f"<0x{byte:02X}>") not in known and chr(byte) not in known
        ]
    elif definition["model"]["unk_token"]:
        from tokenizers.pre_tokenizers import ByteLevel

        missing = sorted(set(ByteLevel.alphabet()) - set(known))
    if missing:
        raise _unknown("model.vocab", missing[:5], "those with all 256 bytes")


def _merges(definition: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        tuple(pair.split(" ", 1) if isinstance(pair, str) else pair)
        for pair in definition["model"]["merges"]
    ]


def _scores(definition: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Rank tokens by the first merge that makes them.

    llama.cpp joins the pair whose token has the highest score.
    """
    rank: dict[str, int] = {}
    merges, known = _merges(definition), definition["model"]["vocab"]
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    merged = set(merges)
    for text in known:
        halves = ((text[:at], text[at:]) for at in range(1, len(text)))
        missing = next(
            (
                pair
                for pair in halves
                if pair not in merged and pair[0] in known and pair[1] in known
            ),
            None,
        )
        if missing:
            raise _unknown(
                "model.merges",
                {"lacks": missing},
                "those with every pair of tokens that make a token",
            )
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _special(
    tokenizer: PreTrainedTokenizerBase, stops: Iterable[int]
) -> tuple[dict[str, int], dict[str, bool]]:
    """Return special ids, and whether texts get a first and a last token.

    Both are taken from what the tokenizer does with a text.
    """
    around = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    text = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    at = next(index for index in range(len(around)) if around[index : index + len(text)] == text)
    before, after = around[:at], around[at + len(text) :]
    if len(before) > 1 or len(after) > 1:
        raise _unknown("post_processor", around, "one token before a text and one after it")
    ends = list(
        dict.fromkeys(each for each in (*after, tokenizer.eos_token_id, *stops) if each is not None)
    )
    if not ends:
        raise UserError(
            f"the tokenizer has no `eos_token`, so llama.cpp would never stop: set one; {INSTEAD}"
        )
    found = dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False))
    # Without one, llama.cpp takes token 11; this one is not put before texts.
    found["bos_token_id"] = next(
        each for each in (*before, tokenizer.bos_token_id, ends[0]) if each is not None
    )
    found |= {"unk_token_id": tokenizer.unk_token_id, "pad_token_id": tokenizer.pad_token_id}
    special = {name: value for name, value in found.items() if value is not None}
    return special, {"add_bos_token": bool(before), "add_eos_token": bool(after)}
