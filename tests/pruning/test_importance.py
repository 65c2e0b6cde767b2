"""Importance scores against a computation of their own: if this broke, the wrong units would go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from qpruner.calibration import visit_gradients
from qpruner.errors import TrainingDiverged
from qpruner.models.loading import load_dense
from qpruner.pruning.importance import Scores, magnitude, taylor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAD = 1
LAYERS = range(2)


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return load_dense(str(tiny_model), "float32")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, list[int]]]:
    """Six samples of different lengths, prompts masked in half of them."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(6):
        ids = torch.randint(2, 400, (5 + 3 * index,), generator=generator).tolist()
        masked = 3 if index % 2 else 0
        samples.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return samples


def by_unit(model: PreTrainedModel, salience: dict[str, torch.Tensor]) -> Scores:
    """Sum a salience of every weight over each unit, written out head by head and channel by channel."""
    scores: Scores = {}
    config = model.config
    head_dim, groups = config.head_dim, config.num_key_value_heads
    num_queries = config.num_attention_heads // groups * head_dim
    for index in LAYERS:
        part = {
            name.removeprefix(f"model.layers.{index}."): value
            for name, value in salience.items()
            if name.startswith(f"model.layers.{index}.")
        }
        heads = []
        for group in range(groups):
            keys = slice(group * head_dim, (group + 1) * head_dim)
            queries = slice(group * num_queries, (group + 1) * num_queries)
            heads.append(
                part["self_attn.q_proj.weight"][queries].sum()
                + part["self_attn.k_proj.weight"][keys].sum()
                + part["self_attn.v_proj.weight"][keys].sum()
                + part["self_attn.o_proj.weight"][:, queries].sum()
            )
        channels = [
            part["mlp.gate_proj.weight"][channel].sum()
            + part["mlp.up_proj.weight"][channel].sum()
            + part["mlp.down_proj.weight"][:, channel].sum()
            for channel in range(config.intermediate_size)
        ]
        scores[index] = {"attention": torch.stack(heads), "mlp": torch.stack(channels)}
    return scores


def weights_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("proj.weight")}


def assert_same(scores: Scores, expected: Scores) -> None:
    assert list(scores) == list(expected)
    for index, kinds in expected.items():
        for kind, values in kinds.items():
            torch.testing.assert_close(scores[index][kind], values, rtol=1e-4, atol=0)


def test_taylor_is_weight_times_gradient_of_the_mean_loss(
    model: PreTrainedModel, tiny_model: Path, rows: list[dict[str, list[int]]]
) -> None:
    scores = taylor(model, LAYERS, rows, PAD)
    # transformers' own loss on one padded batch, with autograd's own gradients.
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.tensor([row["input_ids"] + [PAD] * (longest - len(row["input_ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        ),
    }
    other = load_dense(str(tiny_model), "float32")
    other(**batch).loss.backward()
    salience = {name: (weight * weight.grad).abs().detach() for name, weight in weights_of(other).items()}
    assert_same(scores, by_unit(other, salience))
    assert all(values.std() > 0 for kinds in scores.values() for values in kinds.values())


def test_magnitude_is_the_sum_of_squares(model: PreTrainedModel) -> None:
    salience = {name: weight.detach() ** 2 for name, weight in weights_of(model).items()}
    assert_same(magnitude(model, LAYERS), by_unit(model, salience))


def test_scoring_a_range_of_blocks_is_scoring_them_among_all(
    model: PreTrainedModel, rows: list[dict[str, list[int]]]
) -> None:
    every, last = taylor(model, LAYERS, rows, PAD), taylor(model, range(1, 2), rows, PAD)
    assert list(last) == [1]
    assert all(torch.equal(last[1][kind], every[1][kind]) for kind in ("attention", "mlp"))


@pytest.mark.parametrize("frozen", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_scoring_leaves_the_model_as_it_was(
    model: PreTrainedModel, rows: list[dict[str, list[int]]], frozen: str
) -> None:
    model.get_parameter(frozen).requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = taylor(model, LAYERS, rows, PAD)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    second = taylor(model, LAYERS, rows, PAD)
    assert all(torch.equal(first[index][kind], second[index][kind]) for index in LAYERS for kind in first[index])


def test_one_gradient_at_a_time_is_alive(model: PreTrainedModel, rows: list[dict[str, list[int]]]) -> None:
    """What keeps pruning within the memory of the weights: each gradient is dropped before the next is handed over."""
    weights = weights_of(model)
    alive: list[int] = []

    def visit(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        alive.append(sum(weight.grad is not None for weight in weights.values()))

    visit_gradients(model, weights, rows, PAD, visit, batch_size=3)
    assert len(alive) == 2 * len(weights), "once per batch and weight"
    assert max(alive) <= 1


def test_gradients_add_up_over_batches(model: PreTrainedModel) -> None:
    """Two batches of equal token counts give twice the gradient of all rows at once."""
    ids = torch.randint(2, 400, (4, 9), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    sums: dict[int, torch.Tensor] = {}
    weight = {"q": model.model.layers[0].self_attn.q_proj.weight}

    for batch_size in (4, 2):
        total = torch.zeros_like(weight["q"])
        visit_gradients(
            model, weight, rows, PAD, lambda name, parameter, gradient, t=total: t.add_(gradient), batch_size
        )
        sums[batch_size] = total
    torch.testing.assert_close(sums[2], 2 * sums[4], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_a_broken_weight_is_named(
    model: PreTrainedModel, rows: list[dict[str, list[int]]], criterion: str, bad: float
) -> None:
    """Without the name, a person with a damaged checkpoint could only guess which of hundreds of weights it is."""
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = bad
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    with pytest.raises(TrainingDiverged) as caught:
        magnitude(model, LAYERS) if criterion == "magnitude" else taylor(model, LAYERS, rows, PAD)
    assert name in str(caught.value)
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
