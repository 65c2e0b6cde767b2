"""What the output projections do for what was cut, against solutions of their own on stacked activations.

The references run the whole model for every layer and keep all activations; what they are compared with does neither.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_decoders import FAMILIES, logits_of, samples_of, settings_of, stacked_inputs, tiny

from qpruner.data.calibration import Samples
from qpruner.errors import TrainingDiverged
from qpruner.pruning.compensation import BlockStream, compensate
from qpruner.pruning.prune import prune
from qpruner.pruning.surgery import cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 0.01
KEPT = {
    0: {"attention": (0, 2, 3), "mlp": tuple(range(0, 48, 2))},
    # Block 1 is not cut: what was cut before it changes its inputs all the same.
    2: {"attention": (1,), "mlp": tuple(range(48))},
}
"""Of four heads and 48 channels; the MLP of block 2 keeps all."""
OUTPUTS = {
    "llama": ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj"),
    "olmo2": ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj"),
    "opt": ("model.decoder.layers.{}", "self_attn.out_proj", "fc2"),
    "gpt_neox": ("gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h"),
}


def decoder(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """Four key/value heads of eight in every family."""
    grouped = "num_key_value_heads" in FAMILIES[name]
    return tiny(name, seed, **({"num_key_value_heads": 4} if grouped else {}))


def outputs_of(name: str, model: PreTrainedModel) -> list[tuple[int, str, torch.Tensor]]:
    """In model order, each output projection of which something is cut, its block, and the columns that stay."""
    block, attention, mlp = OUTPUTS[name]
    found = []
    for index, kinds in KEPT.items():
        for linear, units in ((attention, kinds["attention"]), (mlp, kinds["mlp"])):
            path = f"{block.format(index)}.{linear}"
            features = model.get_submodule(path).in_features
            width = features // (4 if linear == attention else 48)
            columns = torch.cat([torch.arange(unit * width, (unit + 1) * width) for unit in units])
            if len(columns) < features:
                found.append((index, path, columns))
    return found


def norms_as_cut(name: str, model: PreTrainedModel, index: int) -> None:
    """OLMo 2: the query and key norms of one block take their mean over the heads that stay."""
    if name != "olmo2":
        return
    attention = model.model.layers[index].self_attn
    for norm in (attention.q_norm, attention.k_norm):
        stays = torch.zeros(4, norm.weight.numel() // 4)
        stays[list(KEPT[index]["attention"])] = 1
        norm.forward = functools.partial(normed_over, norm, stays.flatten())


def normed_over(norm: Any, mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """An RMS norm whose mean is over the entries of a mask."""
    mean_square = (hidden.square() * mask).sum(dim=-1, keepdim=True) / mask.sum()
    normed: torch.Tensor = norm.weight * hidden * torch.rsqrt(mean_square + norm.variance_epsilon)
    return normed


@torch.no_grad()
def solved_by_hand(name: str, model: PreTrainedModel, samples: Samples) -> PreTrainedModel:
    """Ridge regression on all activations at once, layer by layer, each on the model as it is pruned so far."""
    for index, path, stays in outputs_of(name, model):
        norms_as_cut(name, model, index)
        linear = model.get_submodule(path)
        inputs, weight = stacked_inputs(model, path, samples), linear.weight.double()
        kept_inputs, kept_weight = inputs[:, stays], weight[:, stays]
        root = (RIDGE * kept_inputs.square().sum(0).mean()).sqrt()
        system = torch.cat([kept_inputs, root * torch.eye(len(stays), dtype=torch.float64)])
        wanted = torch.cat([inputs @ weight.T, root * kept_weight.T])
        solution = torch.linalg.lstsq(system, wanted).solution.T
        linear.weight.zero_()
        linear.weight[:, stays] = solution.float()
    return model


@torch.no_grad()
def biased_by_hand(name: str, model: PreTrainedModel, samples: Samples) -> PreTrainedModel:
    """FLAP: what the columns that go gave on average, to the bias."""
    for index, path, stays in outputs_of(name, model):
        norms_as_cut(name, model, index)
        linear = model.get_submodule(path)
        removed = torch.tensor([column for column in range(linear.in_features) if column not in stays.tolist()])
        given = linear.weight[:, removed].double() @ stacked_inputs(model, path, samples)[:, removed].mean(0)
        old = linear.bias if linear.bias is not None else torch.zeros(linear.out_features)
        linear.bias = torch.nn.Parameter(old + given.float())
        linear.weight[:, removed] = 0
    return model


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("method", ["least_squares", "bias"])
def test_equals_a_solution_on_stacked_activations(name: str, method: str) -> None:
    """Padded batches of different lengths, windows, blocks side by side: whatever the family does with its inputs."""
    samples = samples_of(batch_size=2)
    model, base = decoder(name), decoder(name)
    by_hand = {"least_squares": solved_by_hand, "bias": biased_by_hand}[method](name, decoder(name), samples)
    compensate(model, KEPT, method, RIDGE, samples)
    for _, path, stays in outputs_of(name, model):
        linear, expected = model.get_submodule(path), by_hand.get_submodule(path)
        torch.testing.assert_close(linear.weight, expected.weight, rtol=1e-3, atol=1e-4)
        gone = [column for column in range(linear.in_features) if column not in stays.tolist()]
        assert not linear.weight[:, gone].any()
        if method == "bias":
            torch.testing.assert_close(linear.bias, expected.bias, rtol=1e-3, atol=1e-4)
            assert torch.equal(linear.weight[:, stays], base.get_submodule(path).weight[:, stays])
        else:
            moved = (linear.weight - base.get_submodule(path).weight)[:, stays].abs().max()
            assert moved > 0.01, "something was solved"
    for index in KEPT:
        norms_as_cut(name, model, index)
    torch.testing.assert_close(logits_of(model), logits_of(by_hand), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("method", ["least_squares", "bias"])
def test_the_cut_itself_then_changes_no_logit(name: str, method: str) -> None:
    model = decoder(name)
    before = logits_of(model)
    compensate(model, KEPT, method, RIDGE, samples_of())
    as_cut = copy.deepcopy(model)
    for index in KEPT:
        norms_as_cut(name, as_cut, index)
    compensated = logits_of(as_cut)
    cut(model, KEPT)
    torch.testing.assert_close(logits_of(model), compensated, rtol=1e-4, atol=1e-4)
    assert (before - compensated).abs().max() > 0.1


@pytest.mark.parametrize(("method", "name"), [("least_squares", "llama"), ("bias", "opt")])
def test_the_pruned_model_is_nearer_to_the_base_model(method: str, name: str) -> None:
    """What it is for, on tokens it was not calibrated on; a bias helps where inputs are not centred, as behind ReLU."""
    off = {}
    for compensation in ("none", method):
        for seed in range(2):
            model, base = decoder(name, seed), decoder(name, seed)
            ridge = {"ridge": RIDGE} if compensation == "least_squares" else {}
            settings = settings_of(rate=0.15, importance="magnitude", compensation=compensation, **ridge)
            pruned = prune(model, settings, samples_of((40,) * 30, seed=seed + 50))
            error = (logits_of(pruned.model, seed=9) - logits_of(base, seed=9)).square().mean()
            off[compensation] = off.get(compensation, 0.0) + float(error)
    assert off[method] < 0.9 * off["none"]


def test_a_strong_ridge_keeps_the_weights_and_a_weak_one_fits_the_samples() -> None:
    samples = samples_of()
    _, path, stays = outputs_of("llama", decoder())[0]
    weight = decoder().get_submodule(path).weight.detach().double()
    inputs = stacked_inputs(decoder(), path, samples)
    errors, moved = [], []
    for ridge in (1e6, 1.0, 1e-2, 1e-4):
        model = decoder()
        compensate(model, KEPT, "least_squares", ridge, samples)
        solved = model.get_submodule(path).weight.detach().double()
        errors.append(float((inputs @ (weight - solved).T).square().sum()))
        moved.append(float((solved - weight)[:, stays].abs().max()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.05 * errors[-1]
    assert moved == sorted(moved) and moved[0] < 1e-4


def test_activations_are_dropped_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a layer's inputs is one square matrix: of a 7B model's down projections 0.5 GB, not 30."""
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    original = BlockStream.visit

    def spying(self: BlockStream, index: int, linear: str, visit: Any) -> None:
        def spy(inputs: torch.Tensor) -> None:
            alive.append(sum(reference() is not None for reference in seen))
            seen.append(weakref.ref(inputs))
            visit(inputs)

        original(self, index, linear, spy)

    monkeypatch.setattr(BlockStream, "visit", spying)
    for method in ("least_squares", "bias"):
        compensate(decoder(), KEPT, method, RIDGE, samples_of(batch_size=1))
    assert len(seen) == 2 * 3 * 5, "two methods, three layers, five samples"
    assert max(alive) == 0


def test_weights_that_cannot_be_solved_are_named() -> None:
    model = decoder()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match=r"weights of model\.layers\.0\.mlp\.down_proj are NaN or infinite"):
        compensate(model, {0: {"mlp": tuple(range(40))}}, "least_squares", RIDGE, samples_of())


def test_a_biased_model_is_the_same_once_saved_and_loaded(tmp_path: Any) -> None:
    """Llama's blocks have no output bias: the folder says which got one."""
    from transformers import AutoModelForCausalLM

    import qpruner.hf  # noqa: F401 (what a user imports)

    settings = settings_of(rate=0.2, compensation="bias")
    pruned = prune(decoder(), settings, samples_of())
    biases = [name for name, _ in pruned.model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 3
    assert any(pruned.model.get_parameter(name).abs().max() > 1e-3 for name in biases)
    pruned.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(pruned.model))
