"""Scales and minima are read and replaced as a format stores them, and the codes stay."""

import pytest
import torch
from made_tensors import normal

from qpruner.quantization.formats import ScaledFormat, formats

SCALED = {name: known for name, known in formats().items() if isinstance(known, ScaledFormat)}
ROWS, COLUMNS = 6, 128


def packed_by(packing: ScaledFormat) -> torch.Tensor:
    """Rows of random weights."""
    return packing.pack(normal(ROWS, COLUMNS, seed=3) * 0.03)["weight"]


@pytest.mark.parametrize("name", SCALED)
def test_scales_written_back_change_no_byte(name: str) -> None:
    packing = SCALED[name]
    packed = packed_by(packing)
    scales = packing.read_scales(packed, COLUMNS)
    assert scales.shape == (ROWS, COLUMNS // packing.group_size, packing.num_scales)
    assert scales.dtype == getattr(torch, packing.scale_type)
    assert torch.equal(packing.write_scales(packed, COLUMNS, scales), packed)


@pytest.mark.parametrize("name", SCALED)
def test_weights_follow_their_scales(name: str) -> None:
    """Doubled numbers of a group double its weights, since codes and zeros stay."""
    packing = SCALED[name]
    packed = packed_by(packing)
    scales = packing.read_scales(packed, COLUMNS).float()
    scales[2, 1] *= 2
    changed = packing.write_scales(packed, COLUMNS, scales)
    expected = packing.unpack({"weight": packed}, COLUMNS, torch.float32)
    size = packing.group_size
    expected[2, size : 2 * size] *= 2
    assert torch.equal(packing.unpack({"weight": changed}, COLUMNS, torch.float32), expected)


@pytest.mark.parametrize("name", SCALED)
def test_scales_are_rounded_to_the_stored_type(name: str) -> None:
    packing = SCALED[name]
    packed = packed_by(packing)
    scales = packing.read_scales(packed, COLUMNS).float() * 1.2345
    changed = packing.write_scales(packed, COLUMNS, scales)
    stored = scales.to(getattr(torch, packing.scale_type))
    assert torch.equal(packing.read_scales(changed, COLUMNS), stored)
