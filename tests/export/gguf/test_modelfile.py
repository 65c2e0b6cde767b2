"""A Modelfile names the files and the ends of answers."""

from pathlib import Path

from tiny_tokenizers import CHATML, byte_level, saved

from qpruner.export.gguf.modelfile import TEMPLATE, modelfile
from qpruner.models.loading import load_tokenizer


def test_a_modelfile_names_files_and_ends(tmp_path: Path) -> None:
    chatting = load_tokenizer(str(saved(byte_level("gpt-2"), tmp_path / "chats", CHATML)))
    assert modelfile("demo.gguf", "demo-adapter.gguf", chatting, [4], 8192) == (
        "# ollama create NAME -f Modelfile && ollama run NAME\n"
        "FROM ./demo.gguf\n"
        "ADAPTER ./demo-adapter.gguf\n"
        'PARAMETER stop "</s>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 4096\n"
        f"{TEMPLATE}\n"
    )
    plain = load_tokenizer(str(saved(byte_level("gpt-2"), tmp_path / "plain", None)))
    text = modelfile("demo.gguf", None, plain, [], 256)
    assert "ADAPTER" not in text
    assert TEMPLATE not in text
    assert text.endswith("PARAMETER num_ctx 256\n")
