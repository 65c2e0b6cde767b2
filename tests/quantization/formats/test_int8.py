"""int8 has the codes and scales of LLM.int8() for every weight, though its layer computes
otherwise."""

import pytest
import torch

from qpruner.quantization.formats import format_of
from qpruner.quantization.rounding import pack

functional = pytest.importorskip("bitsandbytes.functional")
ROWS, COLUMNS = 64, 4096


def weight_of(dtype: torch.dtype, steps: bool) -> torch.Tensor:
    """Random weights, or multiples of half a step of their row, which rounding errors would move to
    another code."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.03
    if steps:
        largest = weight.abs().amax(dim=1, keepdim=True)
        weight = torch.randint(-127, 127, weight.shape, generator=generator).add(0.5) * (
            largest / 127
        )
        weight[:, 0] = largest[:, 0]
    return weight.to(dtype)


@pytest.mark.parametrize("steps", [False, True], ids=["random", "half steps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_are_those_of_llm_int8(dtype: torch.dtype, steps: bool) -> None:
    weight, int8 = weight_of(dtype, steps), format_of("int8")
    theirs, largest, _ = functional.int8_vectorwise_quant(weight)
    tensors = int8.pack(weight)
    assert torch.equal(tensors["weight"][:, :COLUMNS].view(torch.int8), theirs)
    unpacked = theirs.float() * (largest / 127).unsqueeze(1)
    assert torch.equal(int8.unpack(tensors, COLUMNS, torch.float32), unpacked)
    columns = weight[:, :256]
    assert torch.equal(
        pack(int8, columns, torch.eye(256))["weight"], int8.pack(columns)["weight"]
    ), "GPTQ"


def test_rows_of_zeros_stay_zero() -> None:
    int8 = format_of("int8")
    assert not int8.unpack(int8.pack(torch.zeros(2, 64)), 64, torch.float32).any()
