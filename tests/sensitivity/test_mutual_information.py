"""Compare mutual information with known values: wrong values would give the bits to the wrong
groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from banked_decoders import samples_of

from qpruner.config.schema import SensitivityConfig
from qpruner.data.calibration import Samples
from qpruner.errors import UserError
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense
from qpruner.sensitivity.mutual_information import (
    estimate,
    measure,
    pool_rare,
    spread_positions,
    whitened_components,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = np.ndarray


def less_baseline(outputs: Array, labels: Array, components: int = 4) -> float:
    """Estimate mutual information minus the mean over shuffled labels, as `measure` does."""
    whitened = whitened_components(torch.tensor(outputs, dtype=torch.float32), components)
    shuffled = [np.random.default_rng([9, turn]).permutation(labels) for turn in range(5)]
    baseline = np.mean([estimate(whitened, other, 3) for other in shuffled])
    return float(estimate(whitened, labels, 3) - baseline)


def mixture_information(means: Array, weights: Array) -> float:
    """I(X; Y) of unit Gaussians at `means` ``(classes, 2)``: entropy of X, integrated, less that of
    one Gaussian."""
    axis = np.linspace(-12, 12, 601)
    points = np.stack(np.meshgrid(axis, axis), axis=-1)
    squares = np.square(points[..., None, :] - means).sum(axis=-1)
    density = (np.exp(-squares / 2) @ weights) / (2 * np.pi)
    entropy = -float((density * np.log(density)).sum() * (axis[1] - axis[0]) ** 2)
    return entropy - float(np.log(2 * np.pi * np.e))


@pytest.mark.parametrize(
    ("means", "weights"),
    [
        ([[-0.5, 0.0], [0.5, 0.0]], [0.5, 0.5]),
        ([[3.0, 0.0], [0.9, 2.7], [-2.4, 1.8], [-2.4, -1.8], [0.9, -2.7]], [0.2] * 5),
        ([[0.0, 0.0], [2.5, 0.0], [0.0, 4.0]], [0.8, 0.15, 0.05]),
    ],
    ids=["near", "far", "unequal"],
)
def test_a_gaussian_mixture_has_the_exact_information(
    means: list[list[float]], weights: list[float]
) -> None:
    generator = np.random.default_rng(0)
    labels = generator.choice(len(weights), 3000, p=weights)
    outputs = np.array(means)[labels] + generator.normal(size=(3000, 2))
    expected = mixture_information(np.array(means), np.array(weights))
    assert less_baseline(outputs, labels) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("samples", "num_classes"), [(128, 3), (512, 40)])
def test_independent_labels_have_no_information(samples: int, num_classes: int) -> None:
    found = []
    for seed in range(6):
        generator = np.random.default_rng(seed)
        labels = pool_rare(generator.integers(0, num_classes, samples), 4)
        found.append(less_baseline(generator.normal(size=(samples, 32)), labels))
    assert abs(np.mean(found)) < 0.05
    assert max(map(abs, found)) < 0.3
    # A block with zero weights has a constant output.
    assert abs(less_baseline(np.full((samples, 16), 0.5), labels)) < 0.05


@pytest.mark.parametrize("num_classes", [2, 8])
@pytest.mark.parametrize("jitter", [1e-1, 0.0])
def test_an_output_that_decides_the_label_has_its_entropy(num_classes: int, jitter: float) -> None:
    """Without jitter outputs repeat exactly, like those of the first projections, which see a token
    without context."""
    generator = np.random.default_rng(3)
    labels = generator.integers(0, num_classes, 400)
    noise = generator.normal(size=(400, 64))
    outputs = generator.normal(size=(num_classes, 64))[labels] + jitter * noise
    information = less_baseline(outputs, labels)
    assert information > less_baseline(generator.normal(size=(400, 64)), labels) + 0.3
    assert information == pytest.approx(np.log(num_classes), abs=0.25)


def test_drawn_positions_keep_their_context() -> None:
    kept = spread_positions(SAMPLES.rows, 40, seed=3)
    assert sum(label != -100 for row in kept for label in row["labels"]) == 40
    wholes = [row["input_ids"] for row in SAMPLES.rows]
    for row in kept:
        ids = row["input_ids"]
        assert row["labels"][-1] != -100, "a row ends at its last drawn position"
        assert any(whole[: len(ids)] == ids for whole in wholes)
        pairs = zip(ids, row["labels"], strict=True)
        assert all(label in (-100, token) for token, label in pairs)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return load_dense(str(tiny_model), "float32").eval()


SAMPLES = samples_of([8 + index % 5 for index in range(24)])


def measured(model: PreTrainedModel, group: str, samples: Samples = SAMPLES, **changes: int) -> Any:
    settings = SensitivityConfig.model_validate({"max_positions": 128, "num_shuffles": 2} | changes)
    return measure(model, samples, group, settings, seed=0, on_group=lambda done, total: None)


def test_estimates_do_not_depend_on_the_batch_size(model: PreTrainedModel) -> None:
    steps: list[tuple[int, int]] = []
    samples = replace(SAMPLES, batch_size=8, on_progress=lambda *step: steps.append(step))
    first = measured(model, "sublayer", samples)
    state = torch.get_rng_state()
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert measured(model, "sublayer", samples) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == len(group_linears(model.config, "sublayer"))
    alone = measured(model, "sublayer", replace(SAMPLES, batch_size=1))
    assert alone == pytest.approx(first, abs=0.02)
    # The prediction depends on the output of the last block only.
    assert measured(model, "block", num_neighbors=1)[-1] > 0.3


def test_positions_are_drawn_from_all_rows(model: PreTrainedModel) -> None:
    """A long first row gives only its share of the positions, and rows without a drawn position do
    not run."""
    passed: list[list[int]] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: passed.extend(inputs[0].tolist())
    )
    rows = [*samples_of([61], unlabelled=0).rows, *SAMPLES.rows]
    measured(model, "block", replace(SAMPLES, rows=rows), max_positions=48, num_neighbors=1)
    hook.remove()
    assert 12 < len(passed) < len(rows)


def test_a_model_that_predicts_one_token_is_refused(tiny_model: Path) -> None:
    model = load_dense(str(tiny_model), "float32").eval()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with pytest.raises(UserError, match="predicts the same token"):
        measured(model, "block")
