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

Definition = Mapping[str, Any]
"""A part of `tokenizer.json`."""
INSTEAD = "`--to merged` keeps the tokenizer as it is"
GPT_2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
"""The regular expression of the pre-tokenizer `ByteLevel`."""
SPACE_TO_SIGN = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPLIT_AT_SPACES = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""A step that has no effect after `SPACE_TO_SIGN`, as no space is left."""
TAKING_SPACES = ("lstrip", "rstrip", "single_word")
"""Keys of added tokens that take the spaces around them, which a GGUF file cannot say."""
DIGITS = "\\p{N}"
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_UPPER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
_LOWER = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_NO_LETTER = "[^\\r\\n\\p{L}\\p{N}]?"
_BY_CASE = f"{_NO_LETTER}{_UPPER}*{_LOWER}+|{_NO_LETTER}{_UPPER}+{_LOWER}*"
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

NO_CHATS = "texts that are no chat: begin them with a space"
"""What differs if a tokenizer with a chat template puts a space before the first word only."""

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
    _check_added_tokens(definition)
    _check_bytes(definition)
    before, after = _around_texts(tokenizer)
    special = _special(tokenizer, before, [*after, tokenizer.eos_token_id, *stops])
    tokens, types = _tokens(tokenizer, definition, vocab_size, set(special.values()))

    values: dict[str, Any] = {key: token for key, token in special.items() if token < vocab_size}
    values["add_bos_token"] = bool(before)
    values["add_eos_token"] = bool(after)
    values["token_list"] = tokens
    values["token_types"] = types
    if definition["model"]["byte_fallback"]:
        where = space_prefix(definition)
        is_first = where == "first" and not tokenizer.chat_template
        values["tokenizer_model"] = "llama"
        values["tokenizer_pre"] = "default"
        values["add_space_prefix"] = where == "always" or is_first
        values["token_scores"] = _scores(definition, tokens)
    else:
        values["tokenizer_model"] = "gpt2"
        values["tokenizer_pre"] = pre_tokenizer(definition)
        values["token_merges"] = [" ".join(pair) for pair in _merges(definition)]

    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        values["chat_template"] = template
    return values


def _check_added_tokens(definition: Definition) -> None:
    odd = [
        token["content"]
        for token in definition["added_tokens"]
        if any(token.get(key) for key in TAKING_SPACES)
    ]
    if odd:
        raise _unknown("added_tokens", odd, f"those without {', '.join(TAKING_SPACES)}")


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
    known = "byte-level BPE, and BPE with byte fallback (Llama 2, Gemma)"
    if model.get("type") not in (None, "", "BPE"):
        raise _unknown("model.type", model["type"], known)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(f"model.{key}", model[key], known)
    model["byte_fallback"] = model.get("byte_fallback", False)
    return definition


def pre_tokenizer(definition: Definition) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level BPE."""
    normalizers = _flat(definition["normalizer"], "normalizers")
    if normalizers not in ([], [{"type": "NFC"}]):
        raise _unknown("normalizer", definition["normalizer"], "none, and NFC")

    steps = _flat(definition["pre_tokenizer"], "pretokenizers")
    expressions: list[str] = []
    for step in steps:
        expressions += _expressions(step)
    ignores_merges = bool(definition["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((tuple(expressions), ignores_merges))

    is_byte_level = [step["type"] == "ByteLevel" for step in steps]
    if name is None or not is_byte_level[-1] or is_byte_level.count(True) > 1:
        definitions = [*steps, {"ignore_merges": ignores_merges}]
        raise _unknown("pre_tokenizer", definitions, ", ".join(PRE_TOKENIZERS.values()))
    return name


def space_prefix(definition: Definition) -> str:
    """Return where a BPE with byte fallback puts a space before text.

    This is `always`, `never`, or `first` (at the start only).
    """
    normalizers = _flat(definition["normalizer"], "normalizers")
    pre_tokenizers = _flat(definition["pre_tokenizer"], "pretokenizers")
    if normalizers == [{"type": "Prepend", "prepend": "▁"}, SPACE_TO_SIGN] and not pre_tokenizers:
        return "always"
    if normalizers == [SPACE_TO_SIGN] and pre_tokenizers in ([], [SPLIT_AT_SPACES]):
        return "never"
    match [normalizers, pre_tokenizers]:
        case [
            [],
            [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}],
        ]:
            return str(scheme)
    steps = [normalizers, pre_tokenizers]
    raise _unknown("normalizer and pre_tokenizer", steps, "those of Llama 2, Mistral and Gemma")


def remark(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Say of which texts llama.cpp makes other tokens than the tokenizer; None if of none.

    Of all other texts they make the same (compared on 1,000 texts of many scripts, with published
    tokenizers too, in the tests).
    """
    differing = differing_texts(tokenizer)
    return f"llama.cpp makes other tokens of {differing}" if differing else None


def differing_texts(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Name the texts of which llama.cpp makes other tokens than the tokenizer; None if of none."""
    definition = backend(tokenizer)
    if not definition["model"]["byte_fallback"]:
        if definition["normalizer"]:
            return "letters whose accents are characters of their own (not NFC)"
        if pre_tokenizer(definition) == "tekken":
            return "words with combining marks (Hindi, Bengali, some emoji)"
        return None

    where = space_prefix(definition)
    if where == "never" or definition["normalizer"]:
        # Gemma has runs of the sign, which is taken for a space.
        added = [token["content"] for token in definition["added_tokens"]]
        return "texts with the sign ▁" if any(set(text) == {"▁"} for text in added) else None
    if where != "first":
        return "texts with a space at the begin or after a special token"
    if tokenizer.chat_template:
        return NO_CHATS
    return "texts that begin with a space, or have special tokens and then text"


def stop_ids(folder: Path) -> list[int]:
    """Return the ids at which generation ends.

    They are in `generation_config.json`, or else in `config.json`.
    """
    for file in (folder / "generation_config.json", folder / "config.json"):
        ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def _unknown(key: str, value: Any, known: str) -> UserError:
    shown = json.dumps(value, ensure_ascii=False)
    return UserError(
        f"llama.cpp cannot do what `{key}` of the tokenizer says: {shown}; known are {known}; "
        f"{INSTEAD}"
    )


def _flat(step: Definition | None, key: str) -> list[Definition]:
    """List the steps of a normalizer or pre-tokenizer, those of nested sequences included."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    steps: list[Definition] = []
    for inner in step[key]:
        steps += _flat(inner, key)
    return steps


def _expressions(step: Definition) -> list[str]:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return [GPT_2]
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return []
        case {"type": "Digits", "individual_digits": True}:
            return [DIGITS]
        case {"type": "Split", "pattern": {"Regex": expression}}:
            # Every expression above matches all of a text, so that nothing lies between what it
            # matches.
            if (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
                return [expression]
    return [json.dumps(step)]


def _tokens(
    tokenizer: PreTrainedTokenizerBase,
    definition: Definition,
    vocab_size: int,
    special: set[int],
) -> tuple[list[str], list[int]]:
    """List the text and the type of each row; `special` are ids that the file names."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    known = definition["model"]["vocab"]
    is_spm = definition["model"]["byte_fallback"]
    added = {token["content"] for token in definition["added_tokens"]}

    def is_lost(text: str) -> bool:
        """Return True for a plain token that no text becomes, but that llama.cpp would find.

        The token `</s>` of Qwen is one.
        """
        if text not in TAKEN_FOR_SPECIAL or text in added or known[text] in special:
            return False
        encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return known[text] not in encoded.ids

    for text, index in known.items():
        if index < vocab_size and not is_lost(text):
            is_byte = is_spm and len(text) == 6 and text.startswith("<0x")
            tokens[index] = text
            types[index] = TokenType.BYTE if is_byte else TokenType.NORMAL

    for token in definition["added_tokens"]:
        index = token["id"]
        text = token["content"]
        # Gemma 3 has a token for pictures that its embedding lacks.
        if index >= vocab_size:
            continue
        # With the sign of a space only plain tokens are printed as a space.
        if not token["special"] and is_spm and "▁" in text:
            continue
        tokens[index] = text
        types[index] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if is_spm and text == "<unk>":
            types[index] = TokenType.UNKNOWN

    twice = sorted(text for text, count in Counter(tokens).items() if count > 1)
    if twice:
        raise _unknown("tokens", twice[:5], "those that occur once")
    return tokens, types


def _check_bytes(definition: Definition) -> None:
    """Refuse a byte without a token if the tokenizer has an unknown token.

    Without one, both programs leave such a byte out: the tokenizer of SmolLM2 lacks 12.
    """
    model = definition["model"]
    known = model["vocab"]
    missing: list[str] = []
    if model["byte_fallback"]:
        names = {f"<0x{byte:02X}>": chr(byte) for byte in range(256)}
        missing = [name for name, text in names.items() if not {name, text} & known.keys()]
    elif model["unk_token"]:
        from tokenizers.pre_tokenizers import ByteLevel

        missing = sorted(set(ByteLevel.alphabet()) - set(known))
    if missing:
        raise _unknown("model.vocab", missing[:5], "those with all 256 bytes")


def _merges(definition: Definition) -> list[tuple[str, str]]:
    merges = definition["model"]["merges"]
    return [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in merges]


def _scores(definition: Definition, tokens: Sequence[str]) -> list[float]:
    """Rank tokens by the first merge that makes them.

    llama.cpp joins the pair whose token has the highest score.
    """
    known = definition["model"]["vocab"]
    merges = _merges(definition)
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))

    merged = set(merges)
    for text in known:
        for at in range(1, len(text)):
            pair = (text[:at], text[at:])
            if pair not in merged and pair[0] in known and pair[1] in known:
                needed = "those with every pair of tokens that make a token"
                raise _unknown("model.merges", {"lacks": pair}, needed)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _around_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and after a text, one of each at most."""
    around = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    text = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    start = next(index for index in range(len(around)) if around[index : index + len(text)] == text)
    before = around[:start]
    after = around[start + len(text) :]
    if len(before) > 1 or len(after) > 1:
        raise _unknown("post_processor", around, "one token before a text and one after it")
    return before, after


def _special(
    tokenizer: PreTrainedTokenizerBase, before: Iterable[int], after: Iterable[int | None]
) -> dict[str, int]:
    """Return special ids by their names in a GGUF file.

    They are taken from the tokens before texts, and from those after texts, which end them.
    """
    ends = _without_none(after)
    if not ends:
        raise UserError(
            f"the tokenizer has no `eos_token`, so llama.cpp would never stop: set one; {INSTEAD}"
        )
    special = dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False))
    # Without one, llama.cpp takes token 11; this one is not put before texts.
    special["bos_token_id"] = _without_none([*before, tokenizer.bos_token_id, ends[0]])[0]
    if tokenizer.unk_token_id is not None:
        special["unk_token_id"] = tokenizer.unk_token_id
    if tokenizer.pad_token_id is not None:
        special["pad_token_id"] = tokenizer.pad_token_id
    return special


def _without_none(ids: Iterable[int | None]) -> list[int]:
    """List ids in order, each once."""
    return list(dict.fromkeys(token for token in ids if token is not None))
