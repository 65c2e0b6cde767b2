"""Measured rises against models whose weights were really exchanged, and against the very model that a trial starts."""

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
    """Log-probabilities ``(positions, vocabulary)`` at every predicted position, sample by sample, and the labels."""
    found, labels = [], []
    for row in samples.rows:
        ids, targets = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        found.append(logits[targets != -100].double().log_softmax(dim=-1))
        labels.append(targets[targets != -100])
    return torch.cat(found), torch.cat(labels)


def rises(before: Predictions, after: Predictions) -> tuple[float, float]:
    """Mean divergence of one model's predictions from another's, and the change of the loss."""
    kl = (before[0].exp() * (before[0] - after[0])).sum(dim=1).mean()
    losses = [torch.nn.functional.nll_loss(*each) for each in (before, after)]
    return float(kl), float(losses[1] - losses[0])


def exchanged(subject: Banked, group: str, bits: int) -> torch.nn.Module:
    """A copy of the model with one group's start in place."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for path, error in subject.errors(group, bits).items():
            model.get_submodule(path).weight.add_(error)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_every_rise_is_that_of_an_exchanged_model(tmp_path: Path, name: str) -> None:
    """Padded batches, blocks that are not run again and the head at some positions only change nothing."""
    subject = banked(tmp_path, name, "sublayer" if name == "llama" else "block")
    samples = subject.samples()
    found = measure(subject.model, samples, subject.starts)
    kl, loss = found.mean(found.kl), found.mean(found.loss)
    before = predictions(subject.model, samples)
    for index, group in enumerate(subject.starts.groups):
        for level, bits in enumerate((4, 8)):
            expected = rises(before, predictions(exchanged(subject, group, bits), samples))
            assert (kl[level, index], loss[level, index]) == pytest.approx(expected, rel=1e-2, abs=2e-6)
    assert kl[0].min() > 10 * 2e-6, "the tolerance would hide everything"


@pytest.mark.parametrize(("init", "double_quant"), [("loftq", False), ("plain", True)])
def test_the_rise_is_that_of_a_trials_start(tmp_path: Path, init: str, double_quant: bool) -> None:
    """Real bitsandbytes layers and peft adapters; 8-bit layers round their inputs too, so only 4 bits agree closely."""
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


def test_a_pass_costs_no_block_before_the_group(llama: Banked) -> None:
    """And the model is left as it was."""
    model, runs = llama.model, list[int]()
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    hooks = [
        block.mlp.register_forward_hook(lambda module, inputs, output, index=index: runs.append(index))
        for index, block in enumerate(model.model.layers)
    ]
    measure(model, llama.samples(batch_size=5), llama.starts)
    # Once unquantized, then at two widths for each group up to its own.
    assert [runs.count(index) for index in range(3)] == [1 + 2 * 1, 1 + 2 * 2, 1 + 2 * 3]
    for hook in hooks:
        hook.remove()
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_shares_of_the_samples_join_to_the_whole(llama: Banked) -> None:
    whole, samples = (measure(llama.model, llama.samples(5), llama.starts), llama.samples(2))
    shares = [replace(samples, rows=samples.rows[start::2]) for start in range(2)]
    joined = Measurement.joined([measure(llama.model, share, llama.starts) for share in shares])
    for name in ("kl", "loss", "base_loss"):
        first, second = getattr(whole, name), getattr(joined, name)
        assert joined.mean(second) == pytest.approx(whole.mean(first), rel=1e-3, abs=1e-6)
        assert joined.stderr(second) == pytest.approx(whole.stderr(first), rel=1e-3, abs=1e-6)


def test_the_standard_error_is_that_of_a_mean_over_samples() -> None:
    """As many positions in each sample: the standard error of a plain mean; one sample has no spread."""
    sums = np.random.default_rng(0).normal(size=(1, 1, 50))
    found, alone = (Measurement(np.full(n, 4.0), np.zeros(n), sums[..., :n], sums[..., :n]) for n in (50, 1))
    assert found.mean(sums)[0, 0] == pytest.approx((sums / 4).mean())
    assert found.stderr(sums)[0, 0] == pytest.approx((sums / 4).std(ddof=1) / 50**0.5)
    assert np.isnan(alone.stderr(alone.kl)).all()


def test_a_group_without_numbers_is_named(llama: Banked) -> None:
    starts = llama.starts
    tensors = starts._entries["layers.1", 8]
    tensors |= {name: tensor * torch.nan for name, tensor in tensors.items() if name.endswith("lora_B")}
    with pytest.raises(TrainingDiverged, match=r"layers\.1 at 8 bits"):
        measure(llama.model, llama.samples(), starts)
