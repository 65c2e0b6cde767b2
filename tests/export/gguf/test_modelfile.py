"""A Modelfile names the files, the ends of answers, and a template that writes the model's own chats in Ollama."""

from pathlib import Path

from tiny_tokenizers import CHATML, byte_level, saved
from transformers import PreTrainedTokenizerBase

from qpruner.export.gguf.modelfile import modelfile, ollama_template
from qpruner.models.loading import load_tokenizer

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"


def tokenizer_with(template: str | None, folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(saved(byte_level("gpt-2"), folder, template)))


def test_a_modelfile_names_files_ends_and_template(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(DEFAULT_SYSTEM + CHATML, tmp_path)
    assert modelfile("demo.gguf", "demo-adapter.gguf", tokenizer, [4], 8192) == (
        "# ollama create NAME -f Modelfile && ollama run NAME\n"
        "FROM ./demo.gguf\n"
        "ADAPTER ./demo-adapter.gguf\n"
        'PARAMETER stop "</s>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 4096\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n'
        "{{ else }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n{{ .Response }}"""\n'
    )


def test_a_template_without_system_messages_says_so(tmp_path: Path) -> None:
    text = modelfile("demo.gguf", None, tokenizer_with(MISTRAL, tmp_path), [], 256)
    assert "ADAPTER" not in text
    assert "PARAMETER num_ctx 256\n# A system message is left out" in text
    # The tokenizer adds no first token, so the template does.
    assert '{{ if eq .Role "user" }}[INST] {{ .Content }} [/INST]' in text
    assert 'TEMPLATE """<s>{{ range' in text


def test_what_ollama_cannot_say_is_left_to_ollama(tmp_path: Path) -> None:
    shouting = CHATML.replace("message['content']", "message['content'] | upper")
    tokenizer = tokenizer_with(shouting, tmp_path)
    assert ollama_template(tokenizer) is None
    assert "# Ollama's templates cannot say" in modelfile("demo.gguf", None, tokenizer, [], 256)
    dated = "{{ strftime_now('%d') }}" + CHATML
    assert ollama_template(tokenizer_with(dated, tmp_path)) is None
    counting = CHATML.replace("message['role']", "message['role'] + loop.index | string")
    assert ollama_template(tokenizer_with(counting, tmp_path)) is None


def test_a_model_without_chats_has_no_template(tmp_path: Path) -> None:
    text = modelfile("demo.gguf", None, tokenizer_with(None, tmp_path), [], 256)
    assert "TEMPLATE" not in text and "emplates cannot" not in text
