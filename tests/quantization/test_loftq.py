"""LoftQ: the initial adapter reduces the quantization error and never increases it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_models import DTYPE, GROUP, LORA, fill_bank, logits_of, mixed_plan

from qpruner.config.schema import LoraConfig
from qpruner.models.loading import load_dense
from qpruner.quantization.assembly import assemble, attach_adapters
from qpruner.quantization.loftq import LoftqStart, loftq_start
from qpruner.quantization.mixed import pack, unpack

SHAPES = [(64, 128), (96, 77), (3, 64), (130, 5)]
SCALING = 2.0


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make a random weight with a large direction and an outlier, as in trained models."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    weight = 0.02 * torch.randn(shape, generator=generator)
    weight += 0.05 * torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, shape[1], generator=generator)
    weight[0, 0] = 0.5
    return weight.to(dtype)


def start_of(weight: torch.Tensor, bits: int, double_quant: bool = False, seed: int = 0, **changes: Any) -> LoftqStart:
    options = {"rank": 8, "scaling": SCALING, "loftq_iterations": 1, "svd": "exact", **changes}
    lora = LoraConfig(alpha=options.pop("scaling") * options["rank"], **options)
    return loftq_start(weight, bits, lora, double_quant, seed)


def error_of(weight: torch.Tensor, start: LoftqStart, scaling: float = SCALING) -> float:
    """Compute the error of the dequantized weight plus the adapter, as in the forward pass."""
    rebuilt = unpack(start.packed, torch.float32) + scaling * start.lora_b @ start.lora_a
    return float((weight.float() - rebuilt).norm())


def plain_error_of(weight: torch.Tensor, bits: int, double_quant: bool = False) -> float:
    return float((weight.float() - unpack(pack(weight, bits, double_quant), torch.float32)).norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "svd"), [(4, "randomized"), (8, "exact")])
def test_the_adapter_never_increases_the_error(shape: tuple[int, int], bits: int, svd: str) -> None:
    weight = torch.nn.Parameter(weight_of(shape))
    plain = plain_error_of(weight, bits)
    for iterations, rank in ((1, 1), (3, 8), (1, 200)):
        start = start_of(weight, bits, svd=svd, loftq_iterations=iterations, rank=rank)
        assert (start.lora_a.shape, start.lora_b.shape) == ((rank, shape[1]), (shape[0], rank))
        assert start.plain_error == pytest.approx(plain, rel=1e-5)
        assert start.error == pytest.approx(error_of(weight, start), rel=1e-3, abs=1e-6)
        assert error_of(weight, start) < plain
        kept = (start.lora_a, start.lora_b, *start.packed.values())
        assert not any(tensor.requires_grad for tensor in kept), "they would keep an autograd graph in memory"
    assert error_of(weight, start_of(weight, bits, rank=min(shape))) < 1e-4 * plain
    for dtype, double_quant in ((torch.bfloat16, True), (torch.float16, False)):
        half = weight_of(shape, dtype)
        start = start_of(half, bits, double_quant=double_quant, loftq_iterations=2)
        assert error_of(half, start) < plain_error_of(half, bits, double_quant)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("on_grid", [False, True])
def test_more_iterations_never_increase_the_error(bits: int, on_grid: bool) -> None:
    """Weights on a grid come from an already quantized model; five unchecked iterations would double their error."""
    for shape in SHAPES:
        grid = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).float()
        weight = grid if on_grid else weight_of(shape)
        errors = [start_of(weight, bits, loftq_iterations=iterations).error for iterations in (1, 2, 5)]
        assert errors == sorted(errors, reverse=True)


def test_one_iteration_is_the_best_approximation() -> None:
    """By Eckart-Young the remaining error is the norm of the singular values beyond the rank, for any scaling."""
    weight = weight_of((64, 128))
    values = torch.linalg.svdvals(weight - unpack(pack(weight, 4, False), torch.float32))
    for scaling, rank in ((0.5, 8), (1.0, 1), (4.0, 64)):
        start, tail = start_of(weight, 4, scaling=scaling, rank=rank), float(values[rank:].norm())
        assert start.error == pytest.approx(tail, rel=1e-4, abs=1e-5)
        assert error_of(weight, start, scaling) == pytest.approx(tail, rel=1e-4, abs=1e-5)


def test_the_randomized_svd_is_close_to_the_exact_svd() -> None:
    weight = weight_of((192, 256))
    exact, randomized = start_of(weight, 4), start_of(weight, 4, svd="randomized")
    assert exact.error <= randomized.error * (1 + 1e-6)
    assert randomized.error < 1.01 * exact.error


def test_the_whole_model_starts_closer_to_the_dense_one(tiny_model: Path, tmp_path: Path) -> None:
    dense, distance = logits_of(load_dense(str(tiny_model), DTYPE).eval()), {}
    for init in ("plain", "loftq"):
        lora, bank = LORA.model_copy(update={"init": init, "rank": 16, "alpha": 16.0}), tmp_path / init
        plan = mixed_plan(fill_bank(tiny_model, bank, double_quant=False, lora=lora), (4, 8))
        model, starts = assemble(tiny_model, bank, GROUP, plan, DTYPE, double_quant=False)
        adapted = attach_adapters(model, starts, lora, GROUP, seed=0).eval()
        distance[init] = float((logits_of(adapted) - dense).float().norm())
    assert distance["loftq"] < 0.9 * distance["plain"]


def test_adapters_learn_equally_fast_at_all_bits(tiny_model: Path, tmp_path: Path) -> None:
    """The first update of B is proportional to A, so a norm of A that depends on bits would favour some bits."""
    names = fill_bank(tiny_model, tmp_path, double_quant=False)
    for bits in (4, 8, 16):
        model, starts = assemble(tiny_model, tmp_path, GROUP, mixed_plan(names, (bits,)), DTYPE, double_quant=False)
        adapted = attach_adapters(model, starts, LORA, GROUP, seed=0)
        rows = torch.cat([value.norm(dim=1) for name, value in adapted.named_parameters() if "lora_A" in name])
        assert torch.allclose(rows, torch.ones_like(rows), atol=1e-4)
