"""Formats for vLLM have the codes, words and zeros of compressed-tensors, and HQQ fits its grids
better."""

import pytest
import torch

from qpruner.quantization.formats import formats
from qpruner.quantization.formats.compressed_tensors import W2, W3, W4, W8, Packed

EVERY = [each for each in formats().values() if isinstance(each, Packed)]


def gaussian(columns: int, rows: int = 24) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.03


def test_every_width_has_two_group_sizes_and_two_fits() -> None:
    assert (
        len(EVERY)
        == len({(each.bits, each.group_size, each.half_quadratic) for each in EVERY})
        == 4 * 2 * 2
    )
    for each in EVERY:
        group = "" if each.group_size == 64 else f"_g{each.group_size}"
        assert each.name == f"w{each.bits}{group}{'_hqq' if each.half_quadratic else ''}"


def test_words_are_those_of_compressed_tensors() -> None:
    """The words that its `pack_to_int32` (version 0.20.1) gives for these codes; 3 bits cross the
    edges of words."""
    codes = torch.arange(64).unsqueeze(0) * 37 % 251
    expected = {
        W2: [1228481764, -460090802, 1313683764, 887411603],
        W3: [-719794520, 1664787225, -359897260, 429740236, 1967338410, 214870118],
        W4: [
            -1902839216,
            1348585261,
            764318970,
            -95395385,
            -953318508,
            -1795534671,
            -1312346749,
            -2087388592,
        ],
    }
    eight_bits = codes.to(torch.uint8).view(torch.int32)[0].tolist()
    for each, words in {**expected, W8: eight_bits}.items():
        packed = each.store(
            (codes % each.num_codes).to(torch.uint8), torch.ones(1, 1), torch.zeros(1, 1)
        )
        assert each.parts(packed, 64)["weight_packed"].tolist() == [words], each.name


def test_a_checkpoint_has_scales_and_zeros_as_vllm_wants_them() -> None:
    zeros = torch.tensor([[5.0, 1.0], [7.0, 0.0], [2.0, 6.0]])
    scales = torch.tensor([[1.0, 0.5], [2.0, 0.25], [3.0, 8.0]])
    parts = W3.parts(W3.store(torch.zeros(3, 128, dtype=torch.uint8), scales, zeros), 128)
    assert parts["weight_scale"].dtype == torch.bfloat16 and torch.equal(
        parts["weight_scale"].float(), scales
    )
    assert parts["weight_zero_point"].tolist() == [[5 | 7 << 3 | 2 << 6, 1 | 0 << 3 | 6 << 6]], (
        "packed along rows"
    )
    assert parts["weight_shape"].tolist() == [3, 128]


@pytest.mark.parametrize("each", EVERY, ids=lambda each: each.name)
def test_compressed_tensors_unpacks_the_same(each: Packed) -> None:
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    packed = each.pack(gaussian(192))
    parts, groups = each.parts(packed, 192), 192 // each.group_size
    codes = theirs.unpack_from_int32(parts["weight_packed"], each.bits, torch.Size([24, 192]))
    zeros = theirs.unpack_from_int32(
        parts["weight_zero_point"], each.bits, torch.Size([24, groups]), packed_dim=0
    )
    differences = codes.float().view(24, groups, -1) - zeros.float().unsqueeze(2)
    weight = (differences * parts["weight_scale"].float().unsqueeze(2)).flatten(1)
    assert torch.equal(each.unpack(packed, 192, torch.float32), weight)
    assert torch.equal(theirs.pack_to_int32(codes, each.bits), parts["weight_packed"])


def test_half_quadratic_scales_leave_less_error() -> None:
    """At 2 and 3 bits a range that reaches to the largest weights wastes codes; groups of one value
    must work, too."""
    weight = gaussian(256)
    weight[0, :64], weight[1, :64], weight[2, 0] = 0.0, 0.02, 1.0
    for bits, share in ((2, 0.9), (3, 0.95), (4, 0.98), (8, 0.999)):
        for name in (f"w{bits}", f"w{bits}_g32"):
            plain, fitted = (
                float((each.unpack(each.pack(weight), 256, torch.float32) - weight).norm())
                for each in (formats()[name], formats()[f"{name}_hqq"])
            )
            assert fitted < share * plain, name
    constant = formats()["w3_hqq"].unpack(formats()["w3_hqq"].pack(weight), 256, torch.float32)[
        :2, :64
    ]
    assert torch.allclose(constant, weight[:2, :64], rtol=1 / 256)


def test_float16_models_keep_small_weights() -> None:
    """Scales of 8 bits for weights of 0.001 are below the normal numbers of float16."""
    weight = gaussian(128) / 30
    unpacked = W8.unpack(W8.pack(weight), 128, torch.float16)
    assert float((unpacked.float() - weight).norm() / weight.norm()) < 2 * 2**-8


def test_a_width_that_vllm_cannot_read_is_refused() -> None:
    assert W4.refusal(576, None) is None and W4.refusal(1536, (8, 0)) is None
    assert "groups of 64 columns only if they divide the width, here 608" in str(
        W4.refusal(608, None)
    )
    assert formats()["w4_g32"].refusal(608, None) is None
