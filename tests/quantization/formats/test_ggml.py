"""llama.cpp's formats have the bytes of GGUF files and unpack to the gguf package's values."""

import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qpruner.quantization.formats import format_of

SIMPLE = {"q4_0": 2, "q5_0": 6, "q8_0": 8}
K_QUANTS = {"q2_k": 10, "q3_k": 11, "q4_k": 12, "q6_k": 14}
EVERY = SIMPLE | K_QUANTS
SHAPES = [(40, 512), (1, 256), (13, 1280)]

gguf = pytest.importorskip("gguf")
libgguf = pytest.importorskip("libgguf")


def rows_of(shape: tuple[int, int]) -> torch.Tensor:
    """Random rows, then some that round in a special way."""
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=generator) * 0.03
    special = [
        torch.zeros(shape[1]),
        torch.full((shape[1],), 0.5),
        torch.full((shape[1],), -0.25),
        torch.tensor([0.1, -0.1]).repeat(shape[1] // 2),  # two largest weights of different signs
        torch.tensor([-0.1, 0.1]).repeat(shape[1] // 2),
        torch.arange(shape[1]) % 32 / 2 - 8,  # halves of steps
        torch.arange(shape[1]) % 255 / 2 - 63.5,
        weight[0] * 1e6,
        weight[0] * 1e-6,  # scales are subnormal in float16
        weight[0] * 1e-9,  # scales are 0 in float16
        weight[0].bfloat16().float(),
        torch.nn.functional.one_hot(torch.tensor(5), shape[1]).float(),
    ]
    return torch.cat([weight, torch.stack(special)])


def bits_of(values: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.int32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_bytes_are_those_of_llama_cpp(name: str, shape: tuple[int, int]) -> None:
    weight = rows_of(shape)
    packed = format_of(name).pack(weight)["weight"].numpy()
    np.testing.assert_array_equal(packed, libgguf.quantize_rows(weight.numpy(), EVERY[name]))
    if name in SIMPLE:
        np.testing.assert_array_equal(
            packed, gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType(EVERY[name]))
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_values_are_those_of_gguf_bit_for_bit(name: str, shape: tuple[int, int]) -> None:
    tensors = format_of(name).pack(rows_of(shape))
    theirs = gguf.dequantize(tensors["weight"].numpy(), gguf.GGMLQuantizationType(EVERY[name]))
    ours = format_of(name).unpack(tensors, shape[1], torch.float32)
    np.testing.assert_array_equal(bits_of(ours.numpy()), bits_of(theirs))
    llama = libgguf.dequantize_rows(tensors["weight"].numpy(), EVERY[name])
    np.testing.assert_array_equal(ours.numpy(), llama)


@pytest.mark.parametrize("name", EVERY)
def test_any_bytes_unpack_as_in_gguf(name: str) -> None:
    """Files of others have codes that our rounding never writes."""
    packed = np.random.default_rng(0).integers(
        0, 256, (50, format_of(name).packed_bytes(1, 512, 2)), dtype=np.uint8
    )
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType(EVERY[name]))
    ours = format_of(name).unpack({"weight": torch.from_numpy(packed)}, 512, torch.float32)
    np.testing.assert_array_equal(ours.numpy(), theirs)  # a scale may be infinite or no number


@pytest.mark.parametrize("name", SIMPLE)
def test_scales_beyond_float16_are_infinite_as_theirs(name: str) -> None:
    weight = rows_of((4, 64)) * 1e10
    theirs = libgguf.quantize_rows(weight.numpy(), SIMPLE[name])
    np.testing.assert_array_equal(format_of(name).pack(weight)["weight"].numpy(), theirs)


@pytest.mark.parametrize("name", SIMPLE)
def test_a_transposed_weight_packs_as_its_copy(name: str) -> None:
    weight = rows_of((52, 64)).T
    packed = [format_of(name).pack(each)["weight"] for each in (weight, weight.contiguous())]
    assert torch.equal(*packed)


@pytest.mark.parametrize("name", EVERY)
def test_rows_that_are_no_whole_blocks_are_refused(name: str) -> None:
    block = 32 if name in SIMPLE else 256
    refusal = format_of(name).refusal
    assert refusal(3 * block, None) is None and refusal(3 * block, (7, 5)) is None
    assert refusal(3 * block + 16, None) == f"{3 * block + 16} columns do not divide by {block}"


@pytest.mark.parametrize("name", EVERY)
def test_only_k_quants_need_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libgguf", None)  # cannot be imported now
    remedy = 'the package libgguf is missing: run `pip install "qpruner[gguf]"`'
    assert format_of(name).missing() == (None if name in SIMPLE else remedy)
