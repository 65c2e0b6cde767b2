"""Models of all families in llama.cpp: the logits and tokens of transformers, the bytes of the
checkpoint."""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from conftest import disk_of
from mixed_models import bank_source, groups_of, mixed_plan
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from served_models import MOST_ERROR, built, error_of, saved, written

from qpruner.errors import StorageError
from qpruner.export.gguf import llama_cpp
from qpruner.export.gguf.architectures import refusal
from qpruner.export.gguf.writing import write_adapter, write_gguf
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.layout import table_paths
from qpruner.models.loading import load_tokenizer
from qpruner.pruning.surgery import cut
from qpruner.quantization.assembly import assemble

CASES = [
    *(("alike", name, name) for name in ("llama", "qwen2", "qwen3", "gemma2")),
    ("alike", "mistral", "llama"),
    ("alike", "gemma3_text", "gemma3"),
    ("alike", "llama, biases", "llama"),
    ("uniform", "qwen2", "deci"),
    ("uniform", "qwen3", "qwen3"),
    ("uniform", "gemma2", "gemma2"),
    *(("ragged, dropped", name, "deci") for name in ("llama", "mistral", "qwen2")),
    ("ragged, dropped", "qwen3", "openelm"),
    ("dropped", "gemma3_text", "gemma3"),
    ("ragged", "llama, biases", "deci"),
]


@pytest.fixture(
    params=[None, pytest.param("QPRUNER_TEST_LIBLLAMA", marks=pytest.mark.serve)],
    ids=["xllamacpp", "other"],
)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and request.param not in os.environ:
        pytest.skip("`bash launch/serve_tests.sh` sets where another build is")
    if request.param:
        monkeypatch.setattr(llama_cpp, "library_path", lambda: Path(os.environ[request.param]))


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(("kind", "name", "architecture"), CASES)
def test_llama_cpp_computes_what_transformers_does(
    kind: str, name: str, architecture: str, tiny_model: Path, tmp_path: Path, library: None
) -> None:
    model = built(kind, name, tie_word_embeddings=True)
    assert refusal(model.config) is None
    file = written(model, tiny_model, tmp_path)
    assert fields(file)["general.architecture"] == architecture
    assert error_of(file, model, num_tokens=8) < MOST_ERROR


@pytest.mark.parametrize(
    ("kind", "name"), [("alike", "gemma3_text"), ("alike", "mistral"), ("ragged", "qwen2")]
)
def test_an_untied_head_is_written(
    kind: str, name: str, tiny_model: Path, tmp_path: Path, library: None
) -> None:
    model = built(kind, name, tie_word_embeddings=False)
    assert error_of(written(model, tiny_model, tmp_path), model) < MOST_ERROR


def test_float16_weights_are_written_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    model = built("ragged", "llama").half()
    file = written(model, tiny_model, tmp_path)
    assert fields(file)["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert error_of(file, model.float(), num_tokens=8) < MOST_ERROR


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize(("scaling", "name"), [("linear", "qwen3"), ("llama3", "llama")])
def test_longer_contexts_are_rotated_alike(
    scaling: str, name: str, tiny_model: Path, tmp_path: Path, library: None
) -> None:
    rope = {"rope_type": scaling, "rope_theta": 1e4} | SCALINGS[scaling]
    model = built("ragged", name, tie_word_embeddings=True, rope_parameters=rope)
    assert error_of(written(model, tiny_model, tmp_path), model) < MOST_ERROR


@pytest.mark.parametrize(
    ("kind", "name"), [("ragged", "llama"), ("alike", "qwen2"), ("ragged", "qwen3")]
)
def test_an_adapter_does_what_it_does_in_transformers(
    kind: str, name: str, tiny_model: Path, tmp_path: Path, library: None
) -> None:
    model = built(kind, name, tie_word_embeddings=True)
    file = written(model, tiny_model, tmp_path)
    linears = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, linears).eval()
    assert error_of(file, adapted) > 10 * MOST_ERROR
    adapted.save_pretrained(str(tmp_path))
    write_adapter(tmp_path, tmp_path / "adapter.gguf")
    assert error_of(file, adapted, tmp_path / "adapter.gguf", num_tokens=8) < MOST_ERROR


# ---- packed weights


def packed_model(model: Any, tokenizer: Path, root: Path) -> Path:
    checkpoint = saved(model.bfloat16(), tokenizer, root / "pruned")
    bank = bank_source(checkpoint, root / "bank")
    plan = mixed_plan(groups_of(bank), ("q4_0", "q8_0", "bf16"))
    packed, _ = assemble(bank, plan | dict.fromkeys(table_paths(model.config), "q8_0"))
    save_checkpoint(packed, load_tokenizer(str(tokenizer)), root / "packed")
    return root / "packed"


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def packed(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model with packed layers and blocks of different widths; the Llama has an untied head."""
    sizes = {"hidden_size": 192, "intermediate_size": 64, "head_dim": 32}
    model = built("alike", request.param, **sizes, tie_word_embeddings=request.param != "llama")
    kept = {0: {"attention": (0, 2), "mlp": tuple(range(32))}}
    return packed_model(cut(model, kept), tiny_model, tmp_path_factory.mktemp(request.param))


def test_packed_bytes_are_those_of_the_checkpoint(packed: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(packed, file, "tiny")
    written = {tensor.name: tensor.data.view("uint8") for tensor in gguf.GGUFReader(file).tensors}
    weights = load_file(packed / "model.safetensors")
    stored = {name: weight.view(torch.uint8).numpy() for name, weight in weights.items()}
    q, k, v = (stored[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
    expected = {
        "token_embd.weight": stored["model.embed_tokens.weight"],
        "blk.0.attn_output.weight": stored["model.layers.0.self_attn.o_proj.weight"],
        "blk.0.ffn_gate.weight": stored["model.layers.0.mlp.gate_proj.weight"],
        "blk.0.ffn_down.weight": stored["model.layers.0.mlp.down_proj.weight"],
    }
    if "blk.0.attn_qkv.weight" in written:
        expected["blk.0.attn_qkv.weight"] = numpy.concatenate([q, k, v])
    else:
        expected["blk.0.attn_v.weight"] = v
        for name, rows in (("q", q), ("k", k)):  # rows i and i + 16 of a head become neighbours
            neighbours = rows.reshape(-1, 2, 16, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
            expected[f"blk.0.attn_{name}.weight"] = neighbours
    for name, rows in expected.items():
        assert numpy.array_equal(written[name], rows), name
    assert ("output.weight" in written) == ("lm_head.weight" in stored)


def test_a_full_disk_is_named(tiny_model: Path, tmp_path: Path) -> None:
    room = disk_of("200k", tmp_path / "disk")
    with room as disk, pytest.raises(StorageError, match=r"no space left for .*model\.gguf"):
        write_gguf(tiny_model, disk / "model.gguf", "tiny")
