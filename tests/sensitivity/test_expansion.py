"""Compare predicted rises with plain autograd of the same loss, sample by sample."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from banked_decoders import banked

from qpruner.data.calibration import Samples
from qpruner.errors import TrainingDiverged
from qpruner.sensitivity.expansion import expand, rises


def summed_losses(model: torch.nn.Module, samples: Samples) -> list[torch.Tensor]:
    """Compute the summed loss of each sample in a pass of its own, without padding."""
    losses = []
    for row in samples.rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits
        targets = torch.tensor(row["labels"][1:])
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], targets, reduction="sum"))
    return losses


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox"])
def test_rises_match_gradients_of_single_samples(tmp_path: Path, name: str) -> None:
    subject = banked(tmp_path, name)
    samples = subject.samples()
    by_method = expand(subject.model, samples, subject.starts_of_blocks)
    pairs, found = (
        list(by_method["fisher"]),
        {name: [*each.values()] for name, each in by_method.items()},
    )
    first, fisher = np.zeros(len(pairs)), np.zeros(len(pairs))
    for loss in summed_losses(subject.model, samples):
        subject.model.zero_grad()
        loss.backward()
        for index, (group, level) in enumerate(pairs):
            for path, start in subject.weights(group, level).items():
                weight = subject.model.get_submodule(path).weight
                product = weight.grad * (start - weight.detach())
                first[index] += float(product.sum())
                fisher[index] += float(product.square().sum()) / 2
    num_tokens = sum(label != -100 for row in samples.rows for label in row["labels"])
    first, fisher = first / num_tokens, fisher / num_tokens
    assert found["first_order"] == pytest.approx(first, rel=1e-3, abs=1e-6)
    assert found["fisher"] == pytest.approx(fisher, rel=1e-3)
    assert found["second_order"] == pytest.approx(first + fisher, rel=1e-3, abs=1e-6)


def test_sums_over_a_large_layer_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    error, slopes, squares = (torch.rand(4096, 4096, generator=generator) for _ in range(3))
    exact = float(error.double().flatten() @ slopes.double().flatten())
    squared = float(error.double().square().flatten() @ squares.double().flatten()) / 2
    assert rises(error, slopes, squares) == pytest.approx((exact, squared), rel=1e-5)


def test_padding_and_batch_size_change_nothing(tmp_path: Path) -> None:
    """The model is unchanged afterwards, and a NaN in a layer is reported with its name."""
    llama = banked(tmp_path, "llama", "block")
    model = llama.model
    model.get_submodule("model.layers.1").requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    alone, together = (
        expand(model, llama.samples(batch_size), llama.starts_of_blocks) for batch_size in (1, 5)
    )
    for name in ("first_order", "fisher"):  # the order of summation differs
        assert alone[name] == pytest.approx(together[name], rel=1e-3, abs=1e-7)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.down_proj").weight[0, 0] = torch.nan
    with pytest.raises(TrainingDiverged, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        expand(model, llama.samples(), llama.starts_of_blocks)
