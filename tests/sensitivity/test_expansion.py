"""Compare predicted rises with plain autograd of the same loss, sample by sample."""

import copy
from pathlib import Path

import pytest
import torch
from banked_decoders import banked, predictions_of
from made_tensors import same, seeded

from qpruner.errors import TrainingDiverged
from qpruner.sensitivity.expansion import expand, rises


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox"])
def test_rises_match_gradients_of_single_samples(tmp_path: Path, name: str) -> None:
    subject = banked(tmp_path, name)
    model = subject.model
    samples = subject.samples()
    rises = expand(model, samples, subject.starts_of_blocks)
    first = dict.fromkeys(rises["fisher"], 0.0)
    fisher = dict.fromkeys(first, 0.0)
    num_tokens = 0
    for logits, labels in predictions_of(model, samples):
        num_tokens += len(labels)
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for group, level in first:
            for path, start in subject.weights(group, level).items():
                weight = model.get_submodule(path).weight
                product = weight.grad * (start - weight.detach())
                first[group, level] += float(product.sum())
                fisher[group, level] += float(product.square().sum()) / 2
    for pair in first:
        first[pair] /= num_tokens
        fisher[pair] /= num_tokens
    both = {pair: first[pair] + fisher[pair] for pair in first}
    assert rises["first_order"] == pytest.approx(first, rel=1e-3, abs=1e-6)
    assert rises["fisher"] == pytest.approx(fisher, rel=1e-3)
    assert rises["second_order"] == pytest.approx(both, rel=1e-3, abs=1e-6)


def test_sums_over_a_large_layer_are_exact() -> None:
    generator = seeded(0)
    error, slopes, squares = (torch.rand(2048, 4096, generator=generator) for _ in range(3))
    exact = float(error.double().flatten() @ slopes.double().flatten())
    squared = float(error.double().square().flatten() @ squares.double().flatten()) / 2
    assert rises(error, slopes, squares) == pytest.approx((exact, squared), rel=1e-5)


def test_padding_and_batch_size_change_nothing(tmp_path: Path) -> None:
    """The model is unchanged afterwards, and a NaN in a layer is reported with its name."""
    llama = banked(tmp_path, "llama", "block")
    model = llama.model
    model.get_submodule("model.layers.1").requires_grad_(False)
    before = copy.deepcopy(model)
    alone = expand(model, llama.samples(1), llama.starts_of_blocks)
    together = expand(model, llama.samples(5), llama.starts_of_blocks)
    for name in ("first_order", "fisher"):  # the order of summation differs
        assert alone[name] == pytest.approx(together[name], rel=1e-3, abs=1e-7)
    assert same(model.state_dict(), before.state_dict())
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert new.requires_grad == old.requires_grad
        assert new.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.down_proj").weight[0, 0] = torch.nan
    with pytest.raises(TrainingDiverged, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        expand(model, llama.samples(), llama.starts_of_blocks)
