"""llama.cpp's token ids equal the tokenizer's own, and a tokenizer that it lacks is refused."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import pytest
from same_tokens import texts, token_differences
from tiny_tokenizers import (
    CHATML,
    EXPRESSIONS,
    SPACES,
    byte_level,
    piece,
    saved,
    sentencepiece,
    vocabulary_file,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from qpruner.errors import UserError
from qpruner.export.gguf.llama_cpp import Llama
from qpruner.export.gguf.vocabulary import remark, vocabulary
from qpruner.models.loading import load_tokenizer


def compared(folder: Path, extra: int = 3) -> tuple[Any, list[Any]]:
    """Write a tokenizer; return it and the texts whose ids differ. The embedding has `extra` rows
    more than tokens."""
    tokenizer = load_tokenizer(str(folder))
    return tokenizer, list(
        token_differences(vocabulary_file(folder, len(tokenizer) + extra), folder)
    )


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_byte_level_tokenizers_give_the_same_ids(name: str, tmp_path: Path) -> None:
    folder = saved(byte_level(name), tmp_path, CHATML)
    tokenizer, different = compared(folder)
    assert different == []
    assert vocabulary(tokenizer, len(tokenizer))["tokenizer_pre"] == name


@pytest.mark.parametrize("chat_template", [None, CHATML], ids=["plain", "chat"])
@pytest.mark.parametrize("spaces", SPACES)
def test_byte_fallback_gives_the_same_ids(
    spaces: str, chat_template: str | None, tmp_path: Path
) -> None:
    trained = sentencepiece(spaces)
    trained.add_tokens([AddedToken("\n\n", normalized=False)])
    assert compared(saved(trained, tmp_path, chat_template, unk_token="<unk>"))[1] == []


def test_runs_of_spaces_among_the_added_tokens_stay_spaces(tmp_path: Path) -> None:
    """Gemma has them."""
    trained = sentencepiece("never")
    trained.add_tokens([AddedToken(text, normalized=False) for text in ("▁▁", "▁▁▁")])
    tokenizer, different = compared(saved(trained, tmp_path, unk_token="<unk>"))
    assert different == []
    with Llama(tmp_path / "vocabulary.gguf") as llama:
        assert piece(llama, tokenizer.convert_tokens_to_ids("▁▁")) == b"  "


def test_the_texts_are_varied_and_the_same_each_time(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(saved(byte_level("gpt-2"), tmp_path, CHATML)))
    found, again = (list(islice(texts(tokenizer), 1000)) for _ in range(2))
    assert found == again
    assert len(set(found)) > 950
    assert sum(is_chat for _, is_chat in found) == 40
    joined = "".join(text for text, _ in found)
    scripts = ("日本語", "👩\u200d👩", "👍🏽", "हिन्दी", "שלום", "e\u0301")
    assert all(
        text in joined for text in (*scripts, "def f(x", "\r\n", "<|im_start|>system\n", "</s>")
    )


def test_another_pre_tokenizer_is_caught(tmp_path: Path) -> None:
    folder = saved(byte_level("llama-bpe"), tmp_path)
    tokenizer = load_tokenizer(str(folder))
    file = vocabulary_file(folder, len(tokenizer))
    right = len(b"llama-bpe").to_bytes(8, "little") + b"llama-bpe"
    wrong = len(b"codeshell").to_bytes(8, "little") + b"codeshell"
    assert file.read_bytes().count(right) == 1
    file.write_bytes(file.read_bytes().replace(right, wrong))
    different = list(token_differences(file, folder))
    assert len(different) > 20
    text, theirs, ours = different[0]
    assert tokenizer(text).input_ids == ours != theirs


def test_words_that_look_special_stay_text(tmp_path: Path) -> None:
    """Qwen has a token `</s>` that no text becomes: llama.cpp would end the answer there."""
    definition = json.loads(byte_level("qwen2").to_str())
    definition["model"]["vocab"]["<|end|>"] = len(definition["model"]["vocab"])
    trained = Tokenizer.from_str(json.dumps(definition))
    tokenizer, different = compared(saved(trained, tmp_path))
    assert different == []
    with Llama(tmp_path / "vocabulary.gguf") as llama:
        assert llama.tokens("a<|end|>b") == tokenizer("a<|end|>b").input_ids
        assert len(llama.tokens("<|end|>")) > 1


def test_tokens_around_texts_follow_the_post_processor(tmp_path: Path) -> None:
    trained = byte_level("gpt-2")
    trained.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", None, [("<s>", 0), ("</s>", 1)]
    )
    saved(trained, tmp_path)
    assert compared(tmp_path)[1] == []
    with Llama(tmp_path / "vocabulary.gguf") as llama:
        assert llama.tokens("", add_special=True) == [0, 1]


def test_texts_of_which_llama_cpp_makes_other_tokens_are_told(tmp_path: Path) -> None:
    folders = (saved(byte_level(name), tmp_path / name) for name in ("gpt-2", "qwen2", "tekken"))
    nothing, accents, marks = (remark(load_tokenizer(str(folder))) for folder in folders)
    assert nothing is None
    assert accents
    assert "not NFC" in accents
    assert marks
    assert "Hindi" in marks
    for template, expected in (
        (None, "begin with a space"),
        (CHATML, "are no chat: begin them with a space"),
    ):
        folder = saved(sentencepiece("first"), tmp_path / f"{template}"[:4], template)
        assert expected in str(remark(load_tokenizer(str(folder))))


def test_an_added_token_without_a_row_is_no_difference(tmp_path: Path) -> None:
    """A token for padding, added by a fine-tune that padded with it and never resized the
    embedding."""
    tokenizer = load_tokenizer(str(saved(byte_level("llama-bpe"), tmp_path)))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    assert not compared(tmp_path, -1)[1]


def test_rows_without_tokens_and_tokens_without_rows(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(saved(byte_level("gpt-2"), tmp_path)))
    types = vocabulary(tokenizer, len(tokenizer) + 2)["token_types"]
    assert types[-2:] == [gguf.TokenType.UNUSED] * 2
    assert types[:5] == [gguf.TokenType.CONTROL] * 5
    tokenizer.add_tokens(["<picture>"])
    assert len(vocabulary(tokenizer, len(tokenizer) - 1)["token_list"]) == len(tokenizer) - 1


def test_answers_end_where_the_model_says(tmp_path: Path) -> None:
    folder = saved(byte_level("gpt-2"), tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 1]}))
    found = vocabulary_file(folder, 1000).read_bytes()
    for name, token in {"eos": 1, "eot": 4, "bos": 0}.items():
        at = found.index(f"tokenizer.ggml.{name}_token_id".encode()) + len(
            f"tokenizer.ggml.{name}_token_id"
        )
        assert int.from_bytes(found[at + 4 : at + 8], "little") == token


def few_merges(trained: Tokenizer) -> None:
    definition = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in definition["merges"][:40]]
    trained.model = models.BPE(definition["vocab"], merges, unk_token="<unk>", byte_fallback=True)


def having(**parts: Any) -> Callable[[Tokenizer], None]:
    return lambda trained: [setattr(trained, name, part) for name, part in parts.items()].clear()


TWO_ENDS = processors.TemplateProcessing(
    "$A <|im_end|> </s>", None, [("<|im_end|>", 4), ("</s>", 1)]
)
WHITESPACE = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
IDS = {"<s>": 0, "</s>": 1, "[UNK]": 2}


@pytest.mark.parametrize(
    ("spaces", "change", "told"),
    [
        (
            "",
            having(model=models.WordPiece(IDS)),
            '`model.type` of the tokenizer says: "WordPiece"; known are byte-le',
        ),
        (
            "",
            having(model=models.Unigram([("<s>", 0.0), ("</s>", 0.0)])),
            '`model.type` of the tokenizer says: "Unigram"',
        ),
        (
            "",
            having(pre_tokenizer=WHITESPACE),
            '`pre_tokenizer` of the tokenizer says: [{"type": "Whitespace"}',
        ),
        (
            "",
            having(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
            '"add_prefix_space": true',
        ),
        (
            "",
            having(normalizer=normalizers.Lowercase()),
            '{"type": "Lowercase"}; known are none, and NFC',
        ),
        ("", having(post_processor=TWO_ENDS), "`post_processor` of the tokenizer says"),
        (
            "",
            lambda trained: trained.add_special_tokens([AddedToken("<mask>", lstrip=True)]),
            '`added_tokens` of the tokenizer says: ["<mask>"]',
        ),
        ("always", having(pre_tokenizer=pre_tokenizers.Metaspace()), '"split": true'),
        ("never", few_merges, '`model.merges` of the tokenizer says: {"lacks": ['),
    ],
)
def test_what_llama_cpp_lacks_is_refused(
    spaces: str, change: Callable[[Tokenizer], Any], told: str, tmp_path: Path
) -> None:
    trained = sentencepiece(spaces) if spaces else byte_level("gpt-2")
    change(trained)
    tokenizer = load_tokenizer(str(saved(trained, tmp_path)))
    with pytest.raises(UserError) as raised:
        vocabulary(tokenizer, 2000)
    assert told in str(raised.value)
    assert "`--to merged` keeps the tokenizer as it is" in str(raised.value)
