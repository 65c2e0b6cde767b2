"""int8 has the codes and scales of LLM.int8() for every weight, though its layer computes
otherwise."""

import pytest
import torch
from made_tensors import normal, same, seeded

from qpruner.quantization.formats import format_of
from qpruner.quantization.rounding import pack

functional = pytest.importorskip("bitsandbytes.functional")
INT8 = format_of("int8")
ROWS = 64
COLUMNS = 4096


def weight_of(dtype: torch.dtype, steps: bool) -> torch.Tensor:
    """Random weights, or multiples of half a step of their row, which rounding errors would move to
    another code."""
    weight = normal(ROWS, COLUMNS) * 0.03
    if steps:
        largest = weight.abs().amax(dim=1, keepdim=True)
        half_steps = torch.randint(-127, 127, weight.shape, generator=seeded(1)) + 0.5
        weight = half_steps * (largest / 127)
        weight[:, 0] = largest[:, 0]
    return weight.to(dtype)


@pytest.mark.parametrize("steps", [False, True], ids=["random", "half steps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_are_those_of_llm_int8(dtype: torch.dtype, steps: bool) -> None:
    weight = weight_of(dtype, steps)
    theirs, largest, _ = functional.int8_vectorwise_quant(weight)
    tensors = INT8.pack(weight)
    assert torch.equal(tensors["weight"][:, :COLUMNS].view(torch.int8), theirs)
    unpacked = theirs.float() * (largest / 127).unsqueeze(1)
    assert torch.equal(INT8.unpack(tensors, COLUMNS, torch.float32), unpacked)
    columns = weight[:, :256]
    assert same(pack(INT8, columns, torch.eye(256)), INT8.pack(columns)), "GPTQ"


def test_rows_of_zeros_stay_zero() -> None:
    assert not INT8.unpack(INT8.pack(torch.zeros(2, 64)), 64, torch.float32).any()
