"""Every format has a nearest one in llama.cpp."""

import pytest

from qpruner.export.gguf.types import llama_cpp_format
from qpruner.quantization.formats import format_of, formats


@pytest.mark.parametrize("columns", [576, 1536])
def test_formats_of_llama_cpp_stay(columns: int) -> None:
    for name, found in formats().items():
        nearest = format_of(llama_cpp_format(name, columns))
        if found.ggml_type or not found.is_packed:
            assert nearest is found
        else:
            assert nearest.ggml_type
            assert nearest.refusal(columns, None) is None


@pytest.mark.parametrize(
    ("name", "columns", "nearest"),
    [
        ("nf4", 1536, "q4_k"),
        ("nf4_double", 576, "q4_0"),
        ("int8", 576, "q8_0"),
        ("w8_g32_hqq", 1536, "q8_0"),
        ("w3", 1536, "q3_k"),
        ("w2_g32", 1536, "q2_k"),
        ("w2", 576, "q4_0"),
        ("w4", 72, "bf16"),
    ],
)
def test_the_nearest_has_about_as_many_bytes(name: str, columns: int, nearest: str) -> None:
    assert llama_cpp_format(name, columns) == nearest
