"""llama.cpp's formats have the bytes of GGUF files and unpack to the gguf package's values."""

import sys

import numpy as np
import pytest
import torch
from made_tensors import normal, same
from numpy.typing import NDArray

from qpruner.quantization.formats import format_of

SIMPLE = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
K_QUANTS = {"q2_k": 10, "q3_k": 11, "q4_k": 12, "q6_k": 14}
EVERY = SIMPLE | K_QUANTS
SHAPES = [(40, 512), (1, 256), (13, 1280)]

gguf = pytest.importorskip("gguf")
libgguf = pytest.importorskip("libgguf")


def rows_of(shape: tuple[int, int]) -> torch.Tensor:
    """Random rows, then some that round in a special way."""
    rows, columns = shape
    weight = normal(rows, columns, seed=columns) * 0.03
    signs = torch.tensor([0.1, -0.1]).repeat(columns // 2)
    special = [
        torch.zeros(columns),
        torch.full((columns,), 0.5),
        torch.full((columns,), -0.25),
        signs,  # two largest weights of different signs
        -signs,
        torch.arange(columns) % 32 / 2 - 8,  # halves of steps
        torch.arange(columns) % 255 / 2 - 63.5,
        weight[0] * 1e6,
        weight[0] * 1e-6,  # scales are subnormal in float16
        weight[0] * 1e-9,  # scales are 0 in float16
        weight[0].bfloat16().float(),
        torch.eye(columns)[5],
    ]
    return torch.cat([weight, torch.stack(special)])


def bits_of(values: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.int32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_bytes_are_those_of_llama_cpp(name: str, shape: tuple[int, int]) -> None:
    weight = rows_of(shape)
    kind = EVERY[name]
    packed = format_of(name).pack(weight)["weight"].numpy()
    np.testing.assert_array_equal(packed, libgguf.quantize_rows(weight.numpy(), kind))
    if name in SIMPLE:
        theirs = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType(kind))
        np.testing.assert_array_equal(packed, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_values_are_those_of_gguf_bit_for_bit(name: str, shape: tuple[int, int]) -> None:
    kind = EVERY[name]
    tensors = format_of(name).pack(rows_of(shape))
    packed = tensors["weight"].numpy()
    ours = format_of(name).unpack(tensors, shape[1], torch.float32).numpy()
    theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(bits_of(ours), bits_of(theirs))
    np.testing.assert_array_equal(ours, libgguf.dequantize_rows(packed, kind))


@pytest.mark.parametrize("name", EVERY)
def test_any_bytes_unpack_as_in_gguf(name: str) -> None:
    """Files of others have codes that our rounding never writes."""
    packing = format_of(name)
    shape = (50, packing.packed_bytes(1, 512, 2))
    packed = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType(EVERY[name]))
    ours = packing.unpack({"weight": torch.from_numpy(packed)}, 512, torch.float32)
    np.testing.assert_array_equal(ours.numpy(), theirs)  # a scale may be infinite or no number


@pytest.mark.parametrize("name", SIMPLE)
def test_scales_beyond_float16_are_infinite_as_theirs(name: str) -> None:
    weight = rows_of((4, 64)) * 1e10
    theirs = libgguf.quantize_rows(weight.numpy(), SIMPLE[name])
    np.testing.assert_array_equal(format_of(name).pack(weight)["weight"].numpy(), theirs)


@pytest.mark.parametrize("name", SIMPLE)
def test_a_transposed_weight_packs_as_its_copy(name: str) -> None:
    weight = rows_of((52, 64)).T
    packing = format_of(name)
    assert same(packing.pack(weight), packing.pack(weight.contiguous()))


@pytest.mark.parametrize("name", EVERY)
def test_rows_that_are_no_whole_blocks_are_refused(name: str) -> None:
    block = 32 if name in SIMPLE else 256
    refusal = format_of(name).refusal
    assert refusal(3 * block, None) is None
    assert refusal(3 * block, (7, 5)) is None
    assert refusal(3 * block + 16, None) == f"{3 * block + 16} columns do not divide by {block}"


@pytest.mark.parametrize("name", EVERY)
def test_only_k_quants_need_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libgguf", None)  # cannot be imported now
    remedy = 'the package libgguf is missing: run `pip install "qpruner[gguf]"`'
    assert format_of(name).missing() == (None if name in SIMPLE else remedy)
