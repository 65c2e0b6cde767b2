"""Formats for vLLM have the codes, words and zeros of compressed-tensors, and HQQ fits its grids
better."""

import itertools

import pytest
import torch
from made_tensors import distance, normal

from qpruner.quantization.formats import formats
from qpruner.quantization.formats.compressed_tensors import W2, W3, W4, W8, Packed

PACKINGS = [packing for packing in formats().values() if isinstance(packing, Packed)]


def gaussian(columns: int) -> torch.Tensor:
    return normal(24, columns) * 0.03


def error_of(packing: Packed, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    return distance(packing.unpack(packing.pack(weight), weight.shape[1], dtype), weight)


def test_every_width_has_two_group_sizes_and_two_fits() -> None:
    names = set()
    for bits, size, fit in itertools.product((2, 3, 4, 8), ("", "_g32"), ("", "_hqq")):
        name = f"w{bits}{size}{fit}"
        packing = formats()[name]
        assert packing.bits == bits
        assert packing.group_size == (32 if size else 64)
        assert packing.half_quadratic == bool(fit)
        names.add(name)
    assert {packing.name for packing in PACKINGS} == names


def test_words_are_those_of_compressed_tensors() -> None:
    """The words that its `pack_to_int32` (version 0.20.1) gives for these codes; 3 bits cross the
    edges of words."""
    codes = torch.arange(64).unsqueeze(0) * 37 % 251
    words_2 = "1228481764 -460090802 1313683764 887411603"
    words_3 = "-719794520 1664787225 -359897260 429740236 1967338410 214870118"
    words_4 = (
        "-1902839216 1348585261 764318970 -95395385 -953318508 -1795534671 -1312346749 -2087388592"
    )
    words_8 = " ".join(map(str, codes.byte().view(torch.int32)[0].tolist()))
    for packing, words in ((W2, words_2), (W3, words_3), (W4, words_4), (W8, words_8)):
        one = torch.ones(1, 1)
        packed = packing.store((codes % packing.num_codes).byte(), one, 0 * one)
        [stored] = packing.parts(packed, 64)["weight_packed"].tolist()
        assert " ".join(map(str, stored)) == words, packing.name


def test_a_checkpoint_has_scales_and_zeros_as_vllm_wants_them() -> None:
    zeros = torch.tensor([[5.0, 1.0], [7.0, 0.0], [2.0, 6.0]])
    scales = torch.tensor([[1.0, 0.5], [2.0, 0.25], [3.0, 8.0]])
    parts = W3.parts(W3.store(torch.zeros(3, 128, dtype=torch.uint8), scales, zeros), 128)
    assert torch.equal(parts["weight_scale"], scales.bfloat16())
    along_rows = [[5 | 7 << 3 | 2 << 6, 1 | 0 << 3 | 6 << 6]]
    assert parts["weight_zero_point"].tolist() == along_rows
    assert parts["weight_shape"].tolist() == [3, 128]


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.name)
def test_compressed_tensors_unpacks_the_same(packing: Packed) -> None:
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    packed = packing.pack(gaussian(192))
    parts = packing.parts(packed, 192)
    words = parts["weight_packed"]
    codes = theirs.unpack_from_int32(words, packing.bits, torch.Size([24, 192]))
    shape = torch.Size([24, 192 // packing.group_size])
    zeros = theirs.unpack_from_int32(parts["weight_zero_point"], packing.bits, shape, packed_dim=0)
    differences = codes.float().view(*shape, -1) - zeros.float().unsqueeze(2)
    weight = (differences * parts["weight_scale"].float().unsqueeze(2)).flatten(1)
    assert torch.equal(packing.unpack(packed, 192, torch.float32), weight)
    assert torch.equal(theirs.pack_to_int32(codes, packing.bits), words)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        *(("w2", 0.9), ("w2_g32", 0.9), ("w3", 0.95), ("w3_g32", 0.95)),
        *(("w4", 0.98), ("w4_g32", 0.98), ("w8", 0.999), ("w8_g32", 0.999)),
    ],
)
def test_half_quadratic_scales_leave_less_error(name: str, share: float) -> None:
    """At 2 and 3 bits a range that reaches to the largest weights wastes codes; groups of one value
    must work, too."""
    weight = gaussian(256)
    weight[0, :64] = 0.0
    weight[1, :64] = 0.02
    weight[2, 0] = 1.0
    fitted = formats()[f"{name}_hqq"]
    assert error_of(fitted, weight) < share * error_of(formats()[name], weight)
    constant = fitted.unpack(fitted.pack(weight), 256, torch.float32)[:2, :64]
    torch.testing.assert_close(constant, weight[:2, :64], rtol=1 / 256, atol=0)


def test_float16_models_keep_small_weights() -> None:
    """Scales of 8 bits for weights of 0.001 are below the normal numbers of float16."""
    assert error_of(W8, gaussian(128) / 30, torch.float16) < 2 * 2**-8


def test_a_width_that_vllm_cannot_read_is_refused() -> None:
    assert W4.refusal(576, None) is None
    assert W4.refusal(1536, (8, 0)) is None
    refusal = str(W4.refusal(608, None))
    assert "groups of 64 columns" in refusal
    assert "here 608" in refusal
    assert formats()["w4_g32"].refusal(608, None) is None
