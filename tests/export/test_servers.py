"""The commands of `docs/serve.md` work in the programs that are on PATH: llama.cpp's, `ollama`,
`lms` and `vllm`."""

import json
import os
import shlex
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import blocks
from final_models import pruned_model, run_of
from object_store import free_port
from tiny_tokenizers import CHATML, byte_level, saved

from qpruner.export.forms import Form, export
from qpruner.models.loading import load_tokenizer
from qpruner.runs.run_dir import RunDir

pytestmark = pytest.mark.serve
# That of vLLM has its command beside it.
PATH = os.pathsep.join(
    [str(Path(os.environ.get("QPRUNER_VLLM_PYTHON", "")).parent), os.environ["PATH"]]
)
QUESTION = "What melts ice?"
Export = Callable[[Form, str], None]


def documented(start: str) -> list[str]:
    lines = [
        line for each in blocks() if each.page == "docs/serve.md" for line in each.text.splitlines()
    ]
    (line,) = [line for line in lines if line.startswith(f"{start} ")]
    words = shlex.split(line, comments=True)
    program = shutil.which(words[0], path=PATH)
    if program is None:
        pytest.skip(f"`{words[0]}` is not on PATH")
    return [program, *words[1:]]


@pytest.fixture(params=[False, True], ids=["alike", "ragged"])
def is_ragged(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def exported(is_ragged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """Work where `runs/demo` is a run; return a function that exports it to a folder in it."""
    tokenizer = saved(byte_level("smollm"), tmp_path / "tokenizer", CHATML)
    size = len(load_tokenizer(str(tokenizer)))
    pruned = pruned_model("llama", tokenizer, tmp_path / "pruned", is_ragged, vocab_size=size)
    run = run_of(pruned, tmp_path / "runs" / "demo", ("w4", "bf16"))
    monkeypatch.chdir(tmp_path)
    return lambda form, folder: export(RunDir(run), form, run / folder) and None


@contextmanager
def serving(command: Sequence[str], path: str = "/health", **others: str) -> Iterator[str]:
    port = others.pop("port", str(free_port()))
    address = f"http://127.0.0.1:{port}"
    with open("server.log", "w+") as log:
        server = subprocess.Popen(
            [each.format(port=port) for each in command],
            env=os.environ | others,
            stdout=log,
            stderr=log,
        )
        try:
            for _ in range(240):
                assert server.poll() is None, Path("server.log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(address + path, timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            yield address
        finally:
            server.terminate()
            server.wait(timeout=60)


def chat(address: str, model: str) -> Mapping[str, Any]:
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 8,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(asked | {"ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: Mapping[str, Any] = json.load(answer)
    assert found["usage"]["completion_tokens"] == 8
    assert found["model"] == model
    return found


def test_llama_cli_answers(exported: Export) -> None:
    command = documented("llama-cli")
    exported("gguf", "serve/gguf")
    done = subprocess.run(
        [*command, "-n", "8", "--no-warmup"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert QUESTION in done.stdout


def test_llama_server_chats(exported: Export) -> None:
    command = documented("llama-server")
    exported("gguf_merged", "export/gguf_merged")
    with serving(
        [*command, "--host", "127.0.0.1", "--port", "{port}", "--alias", "demo"]
    ) as address:
        assert chat(address, "demo")["choices"][0]["finish_reason"] == "length"


def test_ollama_answers(exported: Export, tmp_path: Path) -> None:
    create = documented("ollama create")
    ask = documented("ollama run")
    exported("gguf", "serve/gguf")
    port = str(free_port())
    environment = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(tmp_path / "models")}
    with serving([create[0], "serve"], "/", port=port, **environment):
        for command in (create, ask):
            done = subprocess.run(
                command, env=os.environ | environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-3000:]


def test_lm_studio_takes_the_file(exported: Export) -> None:
    command = documented("lms import")
    exported("gguf_merged", "export/gguf_merged")
    done = subprocess.run(
        [*command, "--yes", "--copy"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_vllm_chats_with_the_adapter(is_ragged: bool, exported: Export, tmp_path: Path) -> None:
    command = documented("vllm serve")
    exported("vllm", "export/vllm")
    quick = ["--enforce-eager", "--max-num-seqs", "1", "--host", "127.0.0.1", "--port", "{port}"]
    code = ["--trust-remote-code"] if is_ragged else []
    places = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with serving([*command, *code, *quick], **places) as address:
        answers = [chat(address, model)["choices"] for model in ("tuned", "runs/demo/export/vllm")]
    assert answers[0][0]["message"] != answers[1][0]["message"]
