"""Compare measured rises with models whose weights were replaced, and with the initial model of a trial."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from banked_decoders import LORA, Banked, banked

from qpruner.data.calibration import Samples
from qpruner.errors import TrainingDiverged
from qpruner.quantization.assembly import assemble, attach_adapters
from qpruner.sensitivity.measurement import Measurement, measure

Predictions = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def predictions(model: torch.nn.Module, samples: Samples) -> Predictions:
    """Compute log-probabilities ``(positions, vocabulary)`` and labels at all predicted positions, sample by sample."""
    found, labels = [], []
    for row in samples.rows:
        ids, targets = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        found.append(logits[targets != -100].double().log_softmax(dim=-1))
        labels.append(targets[targets != -100])
    return torch.cat(found), torch.cat(labels)


def rises(before: Predictions, after: Predictions) -> tuple[float, float]:
    """Compute the mean KL divergence between predictions of two models, and the change of the loss."""
    kl = (before[0].exp() * (before[0] - after[0])).sum(dim=1).mean()
    losses = [torch.nn.functional.nll_loss(*each) for each in (before, after)]
    return float(kl), float(losses[1] - losses[0])


def with_group_quantized(subject: Banked, group: str, bits: int) -> torch.nn.Module:
    """Copy the model and give one group its initial weights of a trial."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for path, error in subject.errors(group, bits).items():
            model.get_submodule(path).weight.add_(error)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_rises_match_a_model_with_replaced_weights(tmp_path: Path, name: str) -> None:
    """Padding, skipped blocks and the head at labelled positions only do not change the results."""
    subject = banked(tmp_path, name, "sublayer" if name == "llama" else "block")
    samples = subject.samples()
    found = measure(subject.model, samples, subject.starts)
    kl, loss = found.mean(found.kl), found.mean(found.loss)
    before = predictions(subject.model, samples)
    for index, group in enumerate(subject.starts.groups):
        for level, bits in enumerate((4, 8)):
            expected = rises(before, predictions(with_group_quantized(subject, group, bits), samples))
            assert (kl[level, index], loss[level, index]) == pytest.approx(expected, rel=1e-2, abs=2e-6)
    assert kl[0].min() > 10 * 2e-6, "the rises must be larger than the tolerance"


@pytest.mark.parametrize(("init", "double_quant"), [("loftq", False), ("plain", True)])
def test_the_rise_matches_the_initial_model_of_a_trial(tmp_path: Path, init: str, double_quant: bool) -> None:
    """Use real bitsandbytes layers and peft adapters, at 4 bits only: 8-bit layers also round their inputs."""
    subject = banked(tmp_path, "llama", "block", init, double_quant)
    samples = subject.samples()
    found = measure(subject.model, samples, subject.starts)
    plan = {name: 4 if index == 1 else 16 for index, name in enumerate(subject.starts.groups)}
    model, starts = assemble(tmp_path / "model", tmp_path, "block", plan, "float32", double_quant)
    trial = attach_adapters(model, starts, LORA, "block", seed=0).eval()
    kl, loss = rises(predictions(subject.model, samples), predictions(trial, samples))
    assert found.mean(found.kl)[0, 1] == pytest.approx(kl, rel=1e-2)
    assert found.mean(found.loss)[0, 1] == pytest.approx(loss, rel=1e-2)


@pytest.fixture
def llama(tmp_path: Path) -> Banked:
    return banked(tmp_path, "llama", "block")


def test_blocks_before_the_group_do_not_run_again(llama: Banked) -> None:
    """The model is unchanged afterwards."""
    model, runs = llama.model, list[int]()
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    hooks = [
        block.mlp.register_forward_hook(lambda module, inputs, output, index=index: runs.append(index))
        for index, block in enumerate(model.model.layers)
    ]
    measure(model, llama.samples(batch_size=5), llama.starts)
    # Each block runs once unquantized, then at two bit-widths for its own group and each earlier group.
    assert [runs.count(index) for index in range(3)] == [1 + 2 * 1, 1 + 2 * 2, 1 + 2 * 3]
    for hook in hooks:
        hook.remove()
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_joined_shares_equal_one_measurement(llama: Banked) -> None:
    whole, samples = (measure(llama.model, llama.samples(5), llama.starts), llama.samples(2))
    shares = [replace(samples, rows=samples.rows[start::2]) for start in range(2)]
    joined = Measurement.joined([measure(llama.model, share, llama.starts) for share in shares])
    for name in ("kl", "loss", "base_loss"):
        first, second = getattr(whole, name), getattr(joined, name)
        assert joined.mean(second) == pytest.approx(whole.mean(first), rel=1e-3, abs=1e-6)
        assert joined.stderr(second) == pytest.approx(whole.stderr(first), rel=1e-3, abs=1e-6)


def test_the_standard_error_is_over_samples() -> None:
    """With equally many positions per sample it is that of a plain mean; a single sample gives NaN."""
    sums = np.random.default_rng(0).normal(size=(1, 1, 50))
    found, alone = (Measurement(np.full(n, 4.0), np.zeros(n), sums[..., :n], sums[..., :n]) for n in (50, 1))
    assert found.mean(sums)[0, 0] == pytest.approx((sums / 4).mean())
    assert found.stderr(sums)[0, 0] == pytest.approx((sums / 4).std(ddof=1) / 50**0.5)
    assert np.isnan(alone.stderr(alone.kl)).all()


def test_a_group_with_nan_is_named(llama: Banked) -> None:
    starts = llama.starts
    tensors = starts._entries["layers.1", 8]
    tensors |= {name: tensor * torch.nan for name, tensor in tensors.items() if name.endswith("lora_B")}
    with pytest.raises(TrainingDiverged, match=r"layers\.1 at 8 bits"):
        measure(llama.model, llama.samples(), starts)
