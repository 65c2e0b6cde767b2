"""What cannot be written as a GGUF file is refused with the reason and what would work."""

import pytest
from served_models import built
from tiny_families import WINDOW, family_model

from qpruner.export.gguf.architectures import context_length, llama_cpp_format, refusal, remark
from qpruner.quantization.formats import format_of, formats

ELSEWHERE = "--to merged"
UNIFORM = "`prune.uniform: true`"


@pytest.mark.parametrize("name", ["granite", "phi3", "opt", "gpt_neox", "olmo2"])
def test_a_family_without_a_writer_is_refused(name: str) -> None:
    reason = refusal(family_model(name).config)
    assert reason is not None
    assert f"`{name}` models" in reason
    assert ELSEWHERE in reason


@pytest.mark.parametrize(
    ("kind", "name", "tied", "why"),
    [
        ("ragged", "gemma2", True, UNIFORM),
        ("ragged", "gemma3_text", True, UNIFORM),
        ("ragged", "qwen3", False, UNIFORM),
        ("alike", "gemma2", False, ELSEWHERE),
    ],
)
def test_what_no_architecture_takes_is_refused(kind: str, name: str, tied: bool, why: str) -> None:
    assert why in str(refusal(built(kind, name, tie_word_embeddings=tied).config))


def test_a_cut_is_refused_before_it_is_made() -> None:
    config = built("alike", "gemma2").config
    assert refusal(config) is None
    assert UNIFORM in str(refusal(config, ragged=True))
    assert refusal(built("alike", "llama").config, ragged=True) is None


@pytest.mark.parametrize(
    ("rope", "why"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "RoPE scaling `yarn`"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "no RoPE scaling",
        ),
    ],
)
def test_other_rope_scaling_is_refused(rope: dict[str, object], why: str) -> None:
    scaled = {"rope_theta": 1e4, "original_max_position_embeddings": 32} | rope
    assert why in str(refusal(built("alike", "qwen2", rope_parameters=scaled).config))


def test_another_activation_is_refused() -> None:
    assert "`gelu`" in str(refusal(built("alike", "llama", hidden_act="gelu").config))


def test_attention_that_is_scaled_otherwise_is_refused() -> None:
    config = built("alike", "gemma2", query_pre_attn_scalar=20).config
    assert "`query_pre_attn_scalar: 20`" in str(refusal(config))


def test_gemma_2_without_a_sliding_window_is_refused() -> None:
    reason = str(refusal(built("alike", "gemma2", layer_types=["full_attention"] * 3).config))
    assert "sliding window" in reason
    assert ELSEWHERE in reason
    assert refusal(built("alike", "gemma3_text", layer_types=["full_attention"] * 3).config) is None


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_sliding_window_limits_the_context(name: str) -> None:
    config = family_model(name).config
    assert context_length(config) == WINDOW
    assert f"a context of {WINDOW} tokens, not 128" in str(remark(config))
    assert remark(built("alike", name).config) is None


@pytest.mark.parametrize("columns", [576, 1536])
def test_formats_of_llama_cpp_stay(columns: int) -> None:
    for name, found in formats().items():
        nearest = format_of(llama_cpp_format(name, columns))
        assert nearest.ggml_type or not found.is_packed
        assert nearest.refusal(columns, None) is None
        if (found.ggml_type and not found.refusal(columns, None)) or not found.is_packed:
            assert nearest is found


@pytest.mark.parametrize(
    ("name", "columns", "nearest"),
    [
        ("nf4", 1536, "q4_k"),
        ("nf4_double", 576, "q4_0"),
        ("w8_g32_hqq", 1536, "q8_0"),
        ("w3", 1536, "q3_k"),
        ("w2", 576, "q4_0"),
        ("w4", 72, "bf16"),
    ],
)
def test_the_nearest_has_about_as_many_bytes(name: str, columns: int, nearest: str) -> None:
    assert llama_cpp_format(name, columns) == nearest
