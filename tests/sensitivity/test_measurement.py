"""Compare measured rises with models whose weights were replaced, and with the initial model of a
trial."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from banked_decoders import LORA, Banked, banked, predictions_of
from made_tensors import same

from qpruner.data.calibration import Samples
from qpruner.errors import TrainingDiverged
from qpruner.quantization.assembly import assemble, attach_adapters
from qpruner.sensitivity.measurement import measure

Predictions = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def predictions(model: torch.nn.Module, samples: Samples) -> Predictions:
    """Compute log-probabilities ``(positions, vocabulary)`` and labels at all predicted
    positions."""
    logits, labels = zip(*predictions_of(model, samples), strict=True)
    return torch.cat(logits).double().log_softmax(dim=-1), torch.cat(labels)


def rises(before: Predictions, after: Predictions) -> Any:
    """Compute the mean KL divergence of the predictions of two models and the loss's change, as
    approximate numbers."""
    kl = (before[0].exp() * (before[0] - after[0])).sum(dim=1).mean()
    loss = torch.nn.functional.nll_loss(*after) - torch.nn.functional.nll_loss(*before)
    return pytest.approx((float(kl), float(loss)), rel=1e-2, abs=2e-6)


def with_group_quantized(subject: Banked, group: str, level: str) -> torch.nn.Module:
    """Copy the model and give one group its initial weights of a trial."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for path, weight in subject.weights(group, level).items():
            model.get_submodule(path).weight.copy_(weight)
    return model


def check_rises(subject: Banked) -> None:
    """Compare the rises of all groups with those of models whose weights are replaced."""
    samples = subject.samples()
    measured = measure(subject.model, samples, subject.starts)
    before = predictions(subject.model, samples)
    for (group, level), kl in measured["kl"].items():
        after = predictions(with_group_quantized(subject, group, level), samples)
        assert (kl, measured["loss"][group, level]) == rises(before, after), (group, level)
        assert level == "int8" or kl > 10 * 2e-6, "the rises must be larger than the tolerance"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rises_match_a_model_with_replaced_weights(tmp_path: Path, name: str) -> None:
    """Padding, skipped blocks and the head at labelled positions only do not change the results."""
    check_rises(banked(tmp_path, name, "sublayer" if name == "llama" else "block"))


@pytest.mark.parametrize(
    ("name", "tied"), [("llama", False), ("llama", True), ("gemma2", True), ("opt", True)]
)
def test_rises_match_a_model_with_a_replaced_table(tmp_path: Path, name: str, tied: bool) -> None:
    """A head that is tied to the embeddings changes with them; else each is a group."""
    subject = banked(
        tmp_path, name, "block", embeddings=("q4_0", "int8", "bf16"), tie_word_embeddings=tied
    )
    tables = replace(subject, subject=subject.subject.tables)
    assert list(tables.starts.groups) == ["embeddings"] + ["head"] * (not tied)
    check_rises(tables)


@pytest.mark.parametrize(
    ("init", "level"), [("loftq", "nf4"), ("plain", "nf4_double"), ("loftq", "int8")]
)
def test_the_rise_matches_the_initial_model_of_a_trial(
    tmp_path: Path, init: str, level: str
) -> None:
    """Use real packed layers and peft adapters; the embeddings are packed too."""
    subject = banked(tmp_path, "llama", "block", init, (level, "bf16"), ("int8",))
    samples = subject.samples()
    measured = measure(subject.model, samples, subject.starts)
    before = predictions(subject.model, samples)
    for group, name in (("layers.1", level), ("embeddings", "int8")):
        plan = dict.fromkeys(subject.starts.groups, "bf16") | {group: name}
        model, starts = assemble(subject.subject.bank, plan)
        trial = attach_adapters(model, starts, LORA, "block", seed=0).eval()
        measures = (measured["kl"][group, name], measured["loss"][group, name])
        assert measures == rises(before, predictions(trial, samples))


def test_blocks_before_the_group_do_not_run_again(tmp_path: Path) -> None:
    """All run again for embeddings, none for a head. The model is unchanged afterwards."""
    llama = banked(
        tmp_path, "llama", "block", embeddings=("int8", "bf16"), tie_word_embeddings=False
    )
    model = llama.model
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    runs = [0, 0, 0]

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            runs[index] += 1

        return model.model.layers[index].mlp.register_forward_hook(hook)

    hooks = [count(index) for index in range(3)]
    measure(model, llama.samples(batch_size=5), llama.starts)
    # Each block runs once unquantized and once for embeddings, then in two formats for its own and
    # each earlier group.
    assert runs == [2 + 2 * 1, 2 + 2 * 2, 2 + 2 * 3]
    for hook in hooks:
        hook.remove()
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places
    assert same(model.state_dict(), before)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_group_with_nan_is_named(tmp_path: Path) -> None:
    llama = banked(tmp_path, "llama", "block")
    tensors = llama.starts._entries["layers.1", "int8"]
    for name in tensors:
        if name.endswith("lora_B"):
            tensors[name] = tensors[name] * torch.nan
    with pytest.raises(TrainingDiverged, match=r"layers\.1 in int8"):
        measure(llama.model, llama.samples(), llama.starts)
