"""LoftQ: the initial adapter reduces the quantization error and never increases it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from made_tensors import distance, normal, seeded
from mixed_models import (
    DTYPE,
    GROUP,
    LEVELS,
    LORA,
    PATTERN,
    bank_source,
    groups_of,
    logits_of,
    mixed_plan,
)

from qpruner.config.schema import LoraConfig
from qpruner.models.loading import load_dense
from qpruner.quantization.assembly import assemble, attach_adapters
from qpruner.quantization.formats import format_of
from qpruner.quantization.loftq import LoftqStart, loftq_start
from qpruner.quantization.rounding import gram_root, pack

SHAPES = [(64, 128), (96, 77), (3, 64), (130, 5)]
SCALING = 2.0


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make a random weight with a large direction and an outlier, as in trained models."""
    rows, columns = shape
    weight = 0.02 * normal(rows, columns, seed=rows)
    weight += 0.05 * normal(rows, 1, seed=1) @ normal(1, columns, seed=2)
    weight[0, 0] = 0.5
    return weight.to(dtype)


def correlated_gram(columns: int) -> torch.Tensor:
    """Make the Gram matrix of inputs of which a few directions have most of the size."""
    inputs = normal(1000, 4, seed=1) @ normal(4, columns, seed=2)
    inputs += 0.3 * normal(1000, columns, seed=3)
    return inputs.T @ inputs


def output_error(change: torch.Tensor, gram: torch.Tensor | None) -> float:
    """Compute the norm of a change of weights, or of what it makes of the outputs."""
    return float(change.norm() if gram is None else ((change @ gram) * change).sum().sqrt())


def start_of(
    weight: torch.Tensor, name: str, seed: int = 0, gram: torch.Tensor | None = None, **changes: Any
) -> LoftqStart:
    options = {"rank": 8, "scaling": SCALING, "loftq_iterations": 1, "svd": "exact", **changes}
    lora = LoraConfig(alpha=options.pop("scaling") * options["rank"], **options)
    packing = format_of(name)
    return loftq_start(weight, pack(packing, weight, gram), packing, lora, seed, gram)


def change_of(
    weight: torch.Tensor, name: str, start: LoftqStart, scaling: float = SCALING
) -> torch.Tensor:
    """Compute what the unpacked weight plus the adapter differs by, as in the forward pass."""
    unpacked = format_of(name).unpack(start.packed, weight.shape[1], torch.float32)
    return weight.detach().float() - unpacked - scaling * start.lora_b @ start.lora_a


def plain_change_of(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Compute what the unpacked weight differs by without an adapter."""
    packed = format_of(name).pack(weight)
    return weight.detach().float() - format_of(name).unpack(packed, weight.shape[1], torch.float32)


def error_of(weight: torch.Tensor, name: str, start: LoftqStart, scaling: float = SCALING) -> float:
    return float(change_of(weight, name, start, scaling).norm())


def plain_error_of(weight: torch.Tensor, name: str) -> float:
    return float(plain_change_of(weight, name).norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "svd"), [("nf4", "randomized"), ("int8", "exact")])
def test_the_adapter_never_increases_the_error(shape: tuple[int, int], name: str, svd: str) -> None:
    weight = torch.nn.Parameter(weight_of(shape))
    plain = plain_error_of(weight, name)
    for iterations, rank in ((1, 1), (3, 8), (1, 200)):
        start = start_of(weight, name, svd=svd, loftq_iterations=iterations, rank=rank)
        error = error_of(weight, name, start)
        assert start.lora_a.shape == (rank, shape[1])
        assert start.lora_b.shape == (shape[0], rank)
        assert start.plain_error == pytest.approx(plain, rel=1e-5)
        assert start.error == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert error < plain
        for tensor in (start.lora_a, start.lora_b, *start.packed.values()):
            assert not tensor.requires_grad, "it would keep an autograd graph in memory"
    assert error_of(weight, name, start_of(weight, name, rank=min(shape))) < 1e-4 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["nf4_double", "int8"])
def test_weights_of_16_bits_start_closer(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = weight_of(shape, dtype)
        start = start_of(weight, name, loftq_iterations=2)
        assert error_of(weight, name, start) < plain_error_of(weight, name)


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("on_grid", [False, True])
def test_more_iterations_never_increase_the_error(name: str, on_grid: bool) -> None:
    """Weights on a grid come from an already quantized model; five unchecked iterations would
    double their error."""
    for shape in SHAPES:
        grid = torch.randint(-3, 4, shape, generator=seeded(0)).float()
        weight = grid if on_grid else weight_of(shape)
        errors = [start_of(weight, name, loftq_iterations=count).error for count in (1, 2, 5)]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("scaling", "rank"), [(0.5, 8), (1.0, 1), (4.0, 64)])
def test_one_iteration_is_the_best_approximation(scaling: float, rank: int) -> None:
    """By Eckart-Young the remaining error is the norm of the singular values beyond the rank, for
    any scaling."""
    weight = weight_of((64, 128))
    values = torch.linalg.svdvals(plain_change_of(weight, "nf4"))
    tail = pytest.approx(float(values[rank:].norm()), rel=1e-4, abs=1e-5)
    start = start_of(weight, "nf4", scaling=scaling, rank=rank)
    assert start.error == tail
    assert error_of(weight, "nf4", start, scaling) == tail


@pytest.mark.parametrize("gram", [None, correlated_gram(256)], ids=["weights", "outputs"])
def test_the_randomized_svd_is_close_to_the_exact_svd(gram: torch.Tensor | None) -> None:
    weight = weight_of((192, 256))
    exact, randomized = (
        output_error(change_of(weight, "nf4", start_of(weight, "nf4", gram=gram, svd=svd)), gram)
        for svd in ("exact", "randomized")
    )
    assert exact <= randomized * (1 + 1e-6)
    assert randomized < 1.01 * exact


@pytest.mark.parametrize("name", ["nf4", "w3", "w3_hqq", "int8"])
def test_with_a_gram_the_outputs_start_closer(name: str) -> None:
    """Formats with grids are rounded by GPTQ too."""
    weight = weight_of((96, 128))
    gram = correlated_gram(128)
    losses = []
    for iterations in (1, 2, 5):
        start = start_of(weight, name, gram=gram, loftq_iterations=iterations)
        losses.append(output_error(change_of(weight, name, start), gram))
        assert start.error == pytest.approx(losses[-1], rel=1e-3)
        assert start.error < start.plain_error
    assert losses == sorted(losses, reverse=True), "more iterations never lose more"
    assert losses[0] < 0.7 * output_error(change_of(weight, name, start_of(weight, name)), gram)


def test_half_of_the_adapter_repairs_outputs_and_half_reads_the_main_inputs() -> None:
    weight = weight_of((96, 128))
    gram = correlated_gram(128)
    start = start_of(weight, "nf4", gram=gram)
    root = gram_root(gram)
    best = torch.linalg.svdvals(plain_change_of(weight, "nf4") @ root)[8:].norm()
    assert (change_of(weight, "nf4", start) @ root).norm() < 1.1 * best
    sizes = ((start.lora_a @ gram) * start.lora_a).sum(dim=1)
    assert sizes.tolist() == pytest.approx([float(gram.diagonal().mean())] * 8, rel=1e-3)
    principal = torch.linalg.eigh(gram)[1][:, -4:].T.flip(0)
    cosines = torch.nn.functional.cosine_similarity(start.lora_a[:4], principal)
    assert cosines.abs().min() > 0.99


def test_the_whole_model_starts_closer_to_the_dense_one(tiny_model: Path, tmp_path: Path) -> None:
    dense = logits_of(load_dense(str(tiny_model), DTYPE).eval())
    distances = []
    for init in ("loftq", "plain"):
        lora = LORA.model_copy(update={"init": init, "rank": 16, "alpha": 16.0})
        bank = bank_source(tiny_model, tmp_path / init, lora)
        model, starts = assemble(bank, mixed_plan(groups_of(bank), LEVELS))
        adapted = attach_adapters(model, starts, lora, GROUP, seed=0).eval()
        distances.append(distance(logits_of(adapted), dense))
    assert distances[0] < 0.9 * distances[1]


@pytest.mark.parametrize("level", PATTERN)
def test_adapters_learn_equally_fast_in_all_formats(
    level: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The first update of B is proportional to A, so a norm of A that depends on bits would favour
    some formats."""
    bank = bank_source(tiny_model, tmp_path)
    model, starts = assemble(bank, dict.fromkeys(groups_of(bank), level))
    adapted = attach_adapters(model, starts, LORA, GROUP, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            assert parameter.norm(dim=1).tolist() == pytest.approx([1.0] * LORA.rank, abs=4e-3)
