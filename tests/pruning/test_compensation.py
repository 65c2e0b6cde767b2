"""Compensation in the output projections, compared with reference solutions on stacked activations.

The references run the whole model for every layer and keep all activations, which the package does
not.
"""

import copy
from typing import Any

import pytest
import torch
from tiny_decoders import (
    FAMILIES,
    MemoryWitness,
    logits_of,
    samples_of,
    settings_of,
    stacked_inputs,
    tiny,
)
from tiny_families import BLOCKS, LLAMA_OUTPUTS, OUTPUTS, leave_out_of_mean
from transformers import PreTrainedModel

from qpruner.data.calibration import Samples
from qpruner.data.stream import BlockStream
from qpruner.errors import TrainingDiverged
from qpruner.pruning.compensation import compensate
from qpruner.pruning.prune import prune
from qpruner.pruning.surgery import cut

RIDGE = 0.01
KEPT = {
    0: {"attention": (0, 2, 3), "mlp": tuple(range(0, 48, 2))},
    # Block 1 is not cut, but its inputs change.
    2: {"attention": (1,), "mlp": tuple(range(48))},
}
"""Kept units out of four heads and 48 channels; the MLP of block 2 keeps all channels."""
NAMES = ("llama", "gemma2", "olmo2", "phi3", "opt", "gpt_neox")


def decoder(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    grouped = "num_key_value_heads" in FAMILIES[name]
    return tiny(name, seed, **({"num_key_value_heads": 4} if grouped else {}))


def outputs_of(name: str, model: PreTrainedModel) -> list[tuple[int, str, torch.Tensor]]:
    """Return block, path and kept columns of each output projection that loses columns."""
    attention, mlp = OUTPUTS.get(name, LLAMA_OUTPUTS)
    outputs = []
    for index, kinds in KEPT.items():
        for linear, units, count in ((attention, kinds["attention"], 4), (mlp, kinds["mlp"], 48)):
            path = f"{BLOCKS.get(name, 'model.layers')}.{index}.{linear}"
            columns = torch.arange(model.get_submodule(path).in_features).view(count, -1)
            if len(units) < count:
                outputs.append((index, path, columns[list(units)].flatten()))
    return outputs


def norms_as_cut(name: str, model: PreTrainedModel, index: int) -> None:
    if name == "olmo2":
        attention = model.model.layers[index].self_attn
        gone = set(range(4)) - set(KEPT[index]["attention"])
        leave_out_of_mean(attention.q_norm, list(gone), 4)
        leave_out_of_mean(attention.k_norm, list(gone), 4)


@torch.no_grad()
def compensated_by_hand(name: str, model: PreTrainedModel, samples: Samples) -> PreTrainedModel:
    """Compensate by ridge regression, layer by layer, on activations of the model pruned so far."""
    for index, path, stays in outputs_of(name, model):
        norms_as_cut(name, model, index)
        linear = model.get_submodule(path)
        weight = linear.weight.double()
        inputs = stacked_inputs(model, path, samples)
        kept = inputs[:, stays]
        root = (RIDGE * kept.square().sum(0).mean()).sqrt()
        system = torch.cat([kept, root * torch.eye(len(stays))])
        target = torch.cat([inputs @ weight.T, root * weight[:, stays].T])
        linear.weight.zero_()
        linear.weight[:, stays] = torch.linalg.lstsq(system, target).solution.T.float()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_equals_a_solution_on_stacked_activations(name: str) -> None:
    """Batches are padded; families have windows, norms after sublayers, or attention and MLP in
    parallel."""
    samples = samples_of(batch_size=2)
    base = decoder(name)
    model = decoder(name)
    by_hand = compensated_by_hand(name, decoder(name), samples)
    compensate(model, KEPT, RIDGE, samples)
    for _, path, stays in outputs_of(name, model):
        weight = model.get_submodule(path).weight
        expected = by_hand.get_submodule(path).weight
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)
        assert not weight[:, expected.any(dim=0).logical_not()].any()
        change = (weight - base.get_submodule(path).weight)[:, stays]
        assert change.abs().max() > 0.01, "the weights must change"
    compensated = copy.deepcopy(model)
    for index in KEPT:
        norms_as_cut(name, compensated, index)
    torch.testing.assert_close(logits_of(compensated), logits_of(by_hand), rtol=1e-3, atol=1e-3)
    # The cut itself then changes no logit.
    expected = logits_of(compensated)
    torch.testing.assert_close(logits_of(cut(model, KEPT)), expected, rtol=1e-4, atol=1e-4)
    assert (logits_of(base) - expected).abs().max() > 0.1


def test_the_pruned_model_is_nearer_to_the_base_model() -> None:
    """This holds on tokens outside the samples."""

    def error(seed: int, **options: Any) -> float:
        settings = settings_of(rate=0.15, importance="magnitude", **options)
        pruned = prune(decoder(seed=seed), settings, samples_of((40,) * 30, seed=seed + 50))
        difference = logits_of(pruned.model, seed=9) - logits_of(decoder(seed=seed), seed=9)
        return float(difference.square().mean())

    solved = [error(seed, compensation="least_squares", ridge=RIDGE) for seed in (0, 1)]
    assert sum(solved) < 0.9 * (error(0) + error(1))


def test_activations_are_dropped_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one square matrix per layer stays in memory: 0.5 GB for a down projection of a 7B model,
    not 30 GB."""
    witness = MemoryWitness()
    original = BlockStream.visit

    def watched(self: BlockStream, index: int, linear: str, visit: Any) -> None:
        original(self, index, linear, lambda inputs: (witness.see(inputs), visit(inputs)))

    monkeypatch.setattr(BlockStream, "visit", watched)
    compensate(decoder(), KEPT, RIDGE, samples_of(batch_size=1))
    assert witness.num_alive == [0] * (3 * 5), "three layers, five samples"


def test_weights_that_cannot_be_solved_are_named() -> None:
    model = decoder()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match=r"model\.layers\.0\.mlp\.down_proj are NaN"):
        compensate(model, {0: {"mlp": tuple(range(40))}}, RIDGE, samples_of())
