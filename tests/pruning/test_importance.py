"""Importance scores compared with reference computations.

With wrong scores, wrong units would be removed.
"""

import copy
import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from made_tensors import same
from tiny_decoders import PAD, MemoryWitness, keys, rows_of, settings_of, stacked_inputs, tiny
from transformers import PreTrainedModel

from qpruner.data.calibration import Samples, visit_gradients, visit_mask_gradients
from qpruner.data.encoding import collate
from qpruner.errors import TrainingDiverged
from qpruner.models.memory import PeakMemory
from qpruner.pruning.importance import Scores, score
from qpruner.pruning.prune import prune

LAYERS = range(3)
UNITS = {"attention": 2, "mlp": 48}
MATRICES = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


@pytest.fixture
def model() -> PreTrainedModel:
    """Build a model with biases and with confident predictions, so that second-order terms are
    visible."""
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(60)
    return model


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Make five samples of different lengths in one batch, two with masked prompts."""
    rows = rows_of((9, 16, 12, 7, 16))
    for row in rows[1::2]:
        row["labels"] = [-100] * 3 + row["labels"][3:]
    return Samples(rows, PAD, batch_size=8)


def reads_units(matrix: str) -> bool:
    """Whether the columns of a matrix, not its rows, belong to units."""
    return "o_proj" in matrix or "down_proj" in matrix


def by_unit(salience: dict[str, torch.Tensor], reduce: Any = torch.sum) -> Scores:
    """Sum the salience of weights over each unit, then over matrices."""
    scores: Scores = {index: {} for index in LAYERS}
    for index, (kind, matrices) in itertools.product(LAYERS, MATRICES.items()):
        parts = []
        for matrix in matrices:
            lines = salience[f"model.layers.{index}.{matrix}.weight"]
            lines = lines.sum(dim=0 if reads_units(matrix) else 1)
            parts.append(lines.view(UNITS[kind], -1).sum(1).double())
        scores[index][kind] = reduce(torch.stack(parts), 0)
    return scores


def weights_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in parameters if name.endswith("proj.weight")}


def gradients(model: PreTrainedModel, rows: Any) -> dict[str, torch.Tensor]:
    """Return weight times gradient of the loss of transformers on one padded batch."""
    model.zero_grad()
    model(**collate(list(rows), PAD)).loss.backward()
    products = {name: weight.detach() * weight.grad for name, weight in weights_of(model).items()}
    model.zero_grad(set_to_none=True)
    return products


def assert_same(scores: Scores, expected: Scores) -> None:
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)
    for kinds in scores.values():
        assert all(values.std() > 0 for values in kinds.values()), "scores must differ"


@pytest.mark.parametrize(
    ("aggregation", "batch_size"), [("element", 8), ("vector", 2), ("vector", 8)]
)
@pytest.mark.parametrize("order", ["first", "second", "mixed", "fisher"])
def test_taylor_equals_weight_times_gradient(
    model: PreTrainedModel, samples: Samples, order: str, aggregation: str, batch_size: int
) -> None:
    """Second order is the mean of squared sample gradients; by vector, signs cancel within a row or
    column only."""
    criterion = {"importance": "taylor", "order": order}
    if order == "fisher":
        criterion = {"importance": "fisher"}
    settings = settings_of(aggregation=aggregation, **criterion)
    scores = score(model, LAYERS, settings, replace(samples, batch_size=batch_size))
    whole = gradients(model, samples.rows)
    singles = [gradients(model, [row]) for row in samples.rows]
    salience = {}
    for name, first in whole.items():
        single = torch.stack([products[name] for products in singles])
        if aggregation == "vector":
            dim = -2 if reads_units(name) else -1
            first = first.sum(dim, keepdim=True)
            single = single.sum(dim, keepdim=True)
        second = single.square().mean(dim=0)
        by_order = {"first": first.abs(), "mixed": (first - 0.5 * second).abs()}
        salience[name] = by_order.get(order, second)
    assert_same(scores, by_unit(salience))


def test_over_several_batches_the_absolute_values_are_summed(
    model: PreTrainedModel, samples: Samples
) -> None:
    batches = [gradients(model, samples.rows[start : start + 2]) for start in (0, 2, 4)]
    salience = {name: sum(batch[name].abs() for batch in batches) for name in batches[0]}
    scores = score(model, LAYERS, settings_of(), replace(samples, batch_size=2))
    assert_same(scores, by_unit(salience))


@pytest.mark.parametrize(
    ("norm", "reduction", "reduce"),
    [
        ("l1", "sum", torch.sum),
        ("l2", "mean", torch.mean),
        ("l2", "max", torch.amax),
        ("l2", "product", torch.prod),
        ("l2", "last", lambda parts, dim: parts[-1]),
    ],
)
def test_magnitudes_of_matrices_are_reduced_to_one_score(
    model: PreTrainedModel, samples: Samples, norm: str, reduction: str, reduce: Any
) -> None:
    weights = weights_of(model)
    salience = {name: weights[name].detach().abs() ** int(norm[1]) for name in weights}
    settings = settings_of(importance="magnitude", norm=norm, reduction=reduction)
    assert_same(score(model, LAYERS, settings, samples), by_unit(salience, reduce))


@pytest.mark.parametrize("importance", ["fluctuation", "activation_norm"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_output_inputs_are_weighted_by_columns(
    model: PreTrainedModel, samples: Samples, importance: str, batch_size: int
) -> None:
    """The variance of FLAP and the norm of Wanda are over all real tokens, for any batch size."""
    settings = settings_of(importance=importance)
    scores = score(model, LAYERS, settings, replace(samples, batch_size=batch_size))
    expected: Scores = {index: {} for index in LAYERS}
    for index, kind in itertools.product(LAYERS, MATRICES):
        path = f"model.layers.{index}.{MATRICES[kind][-1]}"
        inputs = stacked_inputs(model, path, samples)
        of_feature = inputs.square().mean(0)
        if importance == "fluctuation":
            of_feature = inputs.var(0, unbiased=False)
        columns = model.get_submodule(path).weight.detach().double().square().sum(0)
        expected[index][kind] = (of_feature * columns).view(UNITS[kind], -1).sum(1)
    assert_same(scores, expected)


def test_random_scores_are_those_of_the_seed_alone(
    model: PreTrainedModel, samples: Samples
) -> None:
    settings = settings_of(importance="random")
    first = score(tiny("llama", seed=0), LAYERS, settings, samples, seed=3)
    again = score(tiny("llama", seed=1), LAYERS, settings, samples, seed=3)
    other = score(model, LAYERS, settings, samples, seed=4)
    for index, kind in itertools.product(LAYERS, MATRICES):
        assert len(first[index][kind]) == UNITS[kind]
        assert torch.equal(first[index][kind], again[index][kind])
        assert not torch.equal(first[index][kind], other[index][kind])
    assert not torch.equal(first[0]["mlp"], first[1]["mlp"])


@pytest.mark.parametrize("importance", ["fisher", "fluctuation"])
def test_scores_do_not_depend_on_other_units(
    model: PreTrainedModel, samples: Samples, importance: str
) -> None:
    every = score(model, LAYERS, settings_of(importance=importance), samples)
    some = score(model, (1, 2), settings_of(importance=importance, units=["mlp"]), samples)
    assert list(some) == [1, 2]
    for index, kinds in some.items():
        assert same(kinds, {"mlp": every[index]["mlp"]})


@pytest.mark.parametrize(
    "options", ["order: first", "order: mixed", "aggregation: vector", "importance: fluctuation"]
)
@pytest.mark.parametrize(
    "frozen", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_scoring_leaves_the_model_as_it_was(
    model: PreTrainedModel, samples: Samples, frozen: str, options: str
) -> None:
    settings = settings_of(**keys(options))
    model.get_parameter(frozen).requires_grad_(False)
    before = copy.deepcopy(model)
    first = score(model, LAYERS, settings, samples)
    assert same(model.state_dict(), before.state_dict())
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert new.grad is None
        assert new.requires_grad == old.requires_grad
    second = score(model, LAYERS, settings, samples)
    assert all(same(first[index], second[index]) for index in LAYERS)


def test_one_gradient_at_a_time_is_alive(model: PreTrainedModel, samples: Samples) -> None:
    """Each gradient is freed before the next is computed, so pruning needs little more memory than
    the weights."""
    weights = weights_of(model)
    witness = MemoryWitness()

    def visit(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        witness.see(gradient)
        assert all(weight.grad is None for weight in weights.values())

    visit_gradients(model, weights, replace(samples, batch_size=3), visit)
    assert witness.num_alive == [0] * 2 * len(weights), "once per batch and weight"


@pytest.mark.parametrize("order", ["first", "second"])
def test_salience_needs_one_float32_tensor_per_gradient(order: str) -> None:
    """Not three of them."""
    num_channels = 600_000  # so large that glibc maps and unmaps each tensor
    model = tiny(num_hidden_layers=1, intermediate_size=num_channels).to(torch.bfloat16)
    num_weights = model.model.layers[0].mlp.down_proj.weight.numel()
    settings = settings_of(importance="taylor", order=order, units=["mlp"])
    samples = Samples(rows_of((4,)), PAD, 1)
    score(model, (0,), settings, samples)  # libraries allocate memory once
    peak = PeakMemory()
    score(model, (0,), settings, samples)
    assert peak.bytes() < 10 * num_weights, peak.bytes() / num_weights


@pytest.mark.parametrize("dim", [0, 1])
def test_nothing_of_a_batch_is_left_when_the_next_begins(
    dim: int, model: PreTrainedModel, samples: Samples
) -> None:
    """The garbage collector must not be needed: with it, the peak of the demo was three times one
    batch."""
    witness = MemoryWitness()
    first, second, _ = model.model.layers
    linear = second.mlp.down_proj
    first.register_forward_pre_hook(lambda module, inputs: witness.see())
    linear.register_forward_hook(lambda module, inputs, output: witness.see(*inputs, output))
    rows = replace(samples, batch_size=1)
    gc.collect()
    gc.disable()
    try:
        visit_mask_gradients(model, {"down": (linear, dim)}, rows, lambda name, parts: None)
    finally:
        gc.enable()
    assert len(witness.num_alive) > 2
    assert not any(witness.num_alive)


@pytest.mark.parametrize(
    ("options", "broken", "value", "message"),
    [
        ("", "layers.1.mlp.down_proj", "nan", "^the weight model.layers.1.mlp.down_proj.weight is"),
        # It is not scored, but makes everything after it infinite.
        (
            "",
            "layers.2.input_layernorm",
            "inf",
            "^the weight model.layers.2.input_layernorm.weight",
        ),
        (
            "importance: magnitude",
            "layers.1.mlp.up_proj",
            "1e30",
            "importance of model.layers.1.mlp",
        ),
        (
            *("importance: fluctuation", "layers.1.mlp.down_proj", "1e30"),
            "importance of model.layers.1.mlp.down_",
        ),
        ("aggregation: element", "norm", "3e38", "the gradient of model.layers"),
        ("aggregation: vector", "norm", "3e38", "the gradient at model.layers"),
    ],
)
def test_what_is_broken_is_named(
    model: PreTrainedModel, samples: Samples, options: str, broken: str, value: str, message: str
) -> None:
    """A finite weight may have an infinite square, or make other weights' gradients infinite."""
    with torch.no_grad():
        model.get_parameter(f"model.{broken}.weight").view(-1)[3] = float(value)
    with pytest.raises(TrainingDiverged, match=message):
        prune(model, settings_of(rate=0.2, **keys(options)), samples)
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
