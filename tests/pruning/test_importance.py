"""Importance scores compared with reference computations.

With wrong scores, wrong units would be removed.
"""

import gc
import itertools
from typing import Any

import pytest
import torch
from tiny_decoders import PAD, MemoryWitness, rows_of, settings_of, stacked_inputs, tiny
from transformers import PreTrainedModel

from qpruner.data.calibration import Samples, visit_gradients, visit_mask_gradients
from qpruner.data.encoding import collate
from qpruner.errors import TrainingDiverged
from qpruner.models.memory import PeakMemory
from qpruner.pruning.importance import Scores, score
from qpruner.pruning.prune import prune

LAYERS = range(3)
COLUMNS_OF_UNIT = ("self_attn.o_proj", "mlp.down_proj")
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
    masked = [
        {**row, "labels": [-100] * 3 + row["labels"][3:]} if index % 2 else row
        for index, row in enumerate(rows)
    ]
    return Samples(masked, PAD, batch_size=8)


def units_of(matrix: str, salience: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    by_line = salience.sum(dim=0 if matrix in COLUMNS_OF_UNIT else 1)
    return (
        by_line
        if matrix.startswith("mlp")
        else by_line.view(model.config.num_key_value_heads, -1).sum(1)
    )


def by_unit(
    model: PreTrainedModel,
    salience: dict[str, torch.Tensor],
    reduce: Any = lambda parts: parts.sum(0),
) -> Scores:
    scores: Scores = {index: {} for index in LAYERS}
    for index, (kind, matrices) in itertools.product(LAYERS, MATRICES.items()):
        parts = [
            units_of(matrix, salience[f"model.layers.{index}.{matrix}.weight"], model)
            for matrix in matrices
        ]
        scores[index][kind] = reduce(torch.stack(parts).double())
    return scores


def weights_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith("proj.weight")
    }


def gradients(model: PreTrainedModel, rows: Any) -> dict[str, torch.Tensor]:
    """Return weight times gradient of the loss of transformers on one padded batch."""
    model.zero_grad()
    model(**collate(list(rows), PAD)).loss.backward()
    found = {
        name: (weight * weight.grad).detach().clone() for name, weight in weights_of(model).items()
    }
    model.zero_grad(set_to_none=True)
    return found


def assert_same(scores: Scores, expected: Scores) -> None:
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)
    assert all(values.std() > 0 for kinds in scores.values() for values in kinds.values()), (
        "scores must differ"
    )


@pytest.mark.parametrize(
    ("aggregation", "batch_size"), [("element", 8), ("vector", 2), ("vector", 8)]
)
@pytest.mark.parametrize("order", ["first", "second", "mixed", "fisher"])
def test_taylor_equals_weight_times_gradient(
    model: PreTrainedModel, samples: Samples, order: str, aggregation: str, batch_size: int
) -> None:
    """Second order is the mean of squared sample gradients; by vector, signs cancel within a row or
    column only."""
    criterion = (
        {"importance": "fisher"} if order == "fisher" else {"importance": "taylor", "order": order}
    )
    settings = settings_of(aggregation=aggregation, **criterion)
    scores = score(model, LAYERS, settings, Samples(samples.rows, PAD, batch_size))
    each, whole = [gradients(model, [row]) for row in samples.rows], gradients(model, samples.rows)
    salience = {}
    for name in whole:
        first, *singles = whole[name], *(one[name] for one in each)
        if aggregation == "vector":
            dim = 0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            first, *singles = (matrix.sum(dim, keepdim=True) for matrix in (first, *singles))
        second = sum(one**2 for one in singles) / len(singles)
        salience[name] = {"first": first.abs(), "mixed": (first - 0.5 * second).abs()}.get(
            order, second
        )
    assert_same(scores, by_unit(model, salience))


def test_over_several_batches_the_absolute_values_are_summed(
    model: PreTrainedModel, samples: Samples
) -> None:
    parts = [
        gradients(model, part) for part in (samples.rows[:2], samples.rows[2:4], samples.rows[4:])
    ]
    expected = by_unit(model, {name: sum(part[name].abs() for part in parts) for name in parts[0]})
    assert_same(
        score(model, LAYERS, settings_of(), Samples(samples.rows, PAD, batch_size=2)), expected
    )


@pytest.mark.parametrize(
    ("norm", "reduction", "reduce"),
    [
        ("l1", "sum", lambda parts: parts.sum(0)),
        ("l2", "mean", lambda parts: parts.mean(0)),
        ("l2", "max", lambda parts: parts.max(0).values),
        ("l2", "product", lambda parts: parts.prod(0)),
        ("l2", "last", lambda parts: parts[-1]),
    ],
)
def test_magnitudes_of_matrices_are_reduced_to_one_score(
    model: PreTrainedModel, samples: Samples, norm: str, reduction: str, reduce: Any
) -> None:
    salience = {
        name: weight.detach().abs() ** int(norm[1]) for name, weight in weights_of(model).items()
    }
    settings = settings_of(importance="magnitude", norm=norm, reduction=reduction)
    assert_same(score(model, LAYERS, settings, samples), by_unit(model, salience, reduce))


@pytest.mark.parametrize("importance", ["fluctuation", "activation_norm"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_output_inputs_are_weighted_by_columns(
    model: PreTrainedModel, samples: Samples, importance: str, batch_size: int
) -> None:
    """The variance of FLAP and the norm of Wanda are over all real tokens, for any batch size."""
    scores = score(
        model,
        LAYERS,
        settings_of(importance=importance),
        Samples(samples.rows, PAD, batch_size=batch_size),
    )
    expected: Scores = {index: {} for index in LAYERS}
    for index in LAYERS:
        for kind, linear, units in (
            ("attention", "self_attn.o_proj", 2),
            ("mlp", "mlp.down_proj", 48),
        ):
            path = f"model.layers.{index}.{linear}"
            inputs = stacked_inputs(model, path, samples)
            by_feature = (
                inputs.var(0, unbiased=False)
                if importance == "fluctuation"
                else inputs.square().mean(0)
            )
            columns = model.get_submodule(path).weight.detach().double().square().sum(0)
            expected[index][kind] = (by_feature * columns).view(units, -1).sum(1)
    assert_same(scores, expected)


def test_random_scores_are_those_of_the_seed_alone(
    model: PreTrainedModel, samples: Samples
) -> None:
    settings = settings_of(importance="random")
    first, again = (
        score(tiny("llama", seed=seed), LAYERS, settings, samples, seed=3) for seed in (0, 1)
    )
    other = score(model, LAYERS, settings, samples, seed=4)
    assert {kind: len(values) for kind, values in first[0].items()} == {"attention": 2, "mlp": 48}
    for index, kind in itertools.product(LAYERS, MATRICES):
        assert torch.equal(first[index][kind], again[index][kind])
        assert not torch.equal(first[index][kind], other[index][kind])
    assert not torch.equal(first[0]["mlp"], first[1]["mlp"])


@pytest.mark.parametrize("importance", ["fisher", "fluctuation"])
def test_scores_do_not_depend_on_other_units(
    model: PreTrainedModel, samples: Samples, importance: str
) -> None:
    every = score(model, LAYERS, settings_of(importance=importance), samples)
    some = score(model, (1, 2), settings_of(importance=importance, units=["mlp"]), samples)
    assert {index: list(kinds) for index, kinds in some.items()} == {1: ["mlp"], 2: ["mlp"]}
    assert all(torch.equal(some[index]["mlp"], every[index]["mlp"]) for index in some)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "first"},
        {"order": "mixed"},
        {"aggregation": "vector"},
        {"importance": "fluctuation"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "frozen", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_scoring_leaves_the_model_as_it_was(
    model: PreTrainedModel, samples: Samples, frozen: str, options: dict[str, str]
) -> None:
    model.get_parameter(frozen).requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = score(model, LAYERS, settings_of(**options), samples)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    second = score(model, LAYERS, settings_of(**options), samples)
    assert all(
        torch.equal(first[index][kind], second[index][kind])
        for index in LAYERS
        for kind in first[index]
    )


def test_one_gradient_at_a_time_is_alive(model: PreTrainedModel, samples: Samples) -> None:
    """Each gradient is freed before the next is computed, so pruning needs little more memory than
    the weights."""
    weights, witness = weights_of(model), MemoryWitness()

    def visit(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        witness.see(gradient)
        assert all(weight.grad is None for weight in weights.values())

    visit_gradients(model, weights, Samples(samples.rows, PAD, batch_size=3), visit)
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
    witness, layers = MemoryWitness(), model.model.layers
    linear = layers[1].mlp.down_proj
    layers[0].register_forward_pre_hook(lambda module, inputs: witness.see())
    linear.register_forward_hook(lambda module, inputs, output: witness.see(*inputs, output))
    gc.collect()
    gc.disable()
    try:
        visit_mask_gradients(
            model, {"down": (linear, dim)}, Samples(samples.rows, PAD, 1), lambda name, parts: None
        )
    finally:
        gc.enable()
    assert len(witness.num_alive) > 2 and not any(witness.num_alive)


@pytest.mark.parametrize(
    ("options", "broken", "value", "said"),
    [
        (
            {},
            "layers.1.mlp.down_proj",
            float("nan"),
            "^the weight model.layers.1.mlp.down_proj.weight is NaN",
        ),
        # It is not scored, but makes everything after it infinite.
        (
            {},
            "layers.2.input_layernorm",
            float("inf"),
            "^the weight model.layers.2.input_layernorm.weight is NaN",
        ),
        (
            {"importance": "magnitude"},
            "layers.1.mlp.up_proj",
            1e30,
            "the importance of model.layers.1.mlp.up_proj",
        ),
        (
            {"importance": "fluctuation"},
            "layers.1.mlp.down_proj",
            1e30,
            "the importance of model.layers.1.mlp.down_",
        ),
        ({"aggregation": "element"}, "norm", 3e38, "the gradient of model.layers"),
        ({"aggregation": "vector"}, "norm", 3e38, "the gradient at model.layers"),
    ],
    ids=str,
)
def test_what_is_broken_is_named(
    model: PreTrainedModel,
    samples: Samples,
    options: dict[str, str],
    broken: str,
    value: float,
    said: str,
) -> None:
    """A finite weight may have an infinite square, or make other weights' gradients infinite."""
    with torch.no_grad():
        model.get_parameter(f"model.{broken}.weight").view(-1)[3] = value
    with pytest.raises(TrainingDiverged, match=said):
        prune(model, settings_of(rate=0.2, **options), samples)
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
