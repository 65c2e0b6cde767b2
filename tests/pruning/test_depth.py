"""Dropping whole blocks: which blocks, how many, and together with units of other blocks."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_decoders
import torch
from made_tensors import same
from tiny_decoders import keys, logits_of, samples_of, stacked_inputs, tiny
from tiny_families import BLOCKS, LLAMA_OUTPUTS, OUTPUTS, blocks_of, skip_blocks
from transformers import PreTrainedModel

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import Samples
from qpruner.errors import TrainingDiverged, UserError
from qpruner.pruning.compensation import compensate_blocks
from qpruner.pruning.importance import block_importance
from qpruner.pruning.prune import (
    FirstScores,
    Pruned,
    load_importance,
    num_parameters,
    planned_cut,
    prune,
    save_importance,
)
from qpruner.pruning.settings import settled
from qpruner.pruning.surgery import cut as cut_units

NUM_BLOCKS = 6
ALL_UNITS = "units: [block, attention, mlp]"


def decoder(name: str = "llama", **options: Any) -> PreTrainedModel:
    """Build six blocks; in a Llama, block 1 contributes almost nothing."""
    model = tiny(name, num_hidden_layers=NUM_BLOCKS, **options)
    if name == "llama":
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight.mul_(0.05)
            model.model.layers[1].mlp.down_proj.weight.mul_(0.05)
    return model


def settings_of(**options: Any) -> PruneConfig:
    return tiny_decoders.settings_of(**{"units": ["block"], **options})


@torch.no_grad()
def influence_by_hand(model: PreTrainedModel, samples: Samples) -> dict[int, float]:
    """Compute one minus the mean cosine between block input and output, row by row, unpadded."""
    model.model.norm = torch.nn.Identity()  # otherwise the last hidden states are normed
    rows = []
    for row in samples.rows:
        ids = torch.tensor([row["input_ids"]])
        outputs = model.model(ids, output_hidden_states=True, use_cache=False)
        rows.append(torch.cat(outputs.hidden_states))
    states = torch.cat(rows, dim=1).double()  # (blocks + 1, tokens, features)
    cosines = torch.nn.functional.cosine_similarity(states[:-1], states[1:], dim=-1)
    return dict(enumerate((1 - cosines.mean(dim=1)).tolist()))


@pytest.mark.parametrize("batch_size", [2, 8])
def test_block_influence_is_one_minus_the_mean_cosine(batch_size: int) -> None:
    """Padding does not count as tokens."""
    scores = block_importance(decoder(), range(NUM_BLOCKS), samples_of(batch_size=batch_size))
    assert scores == pytest.approx(influence_by_hand(decoder(), samples_of()), rel=1e-4)
    assert max(scores.values()) > 1.2 * min(scores.values()), "the scores must differ"


def test_a_block_whose_states_are_broken_is_named() -> None:
    """The weights of the block itself are finite."""
    model = decoder()
    torch.nn.init.constant_(model.model.embed_tokens.weight, float("inf"))
    with pytest.raises(TrainingDiverged, match=r"importance of model\.layers\.0 is NaN"):
        block_importance(model, range(NUM_BLOCKS), samples_of())


def test_a_block_is_named_by_its_number_in_the_base() -> None:
    """Block 1 is dropped before the units are scored; one weight of block 4 is too large for a
    square in float32."""
    model = decoder()
    with torch.no_grad():
        model.model.layers[4].mlp.gate_proj.weight[0] = 0  # hides the next weight from the outputs
        model.model.layers[4].mlp.up_proj.weight[0, 0] = 1e30
    settings = settings_of(units=("block", "mlp"), rate=0.3, importance="magnitude")
    with pytest.raises(TrainingDiverged, match=r"model\.layers\.4\.mlp\.up_proj\.weight is NaN"):
        prune(model, settings, samples_of())


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_least_important_blocks_go_and_the_rest_stays(name: str) -> None:
    """The other blocks keep their weights and windows, and find their cache."""
    # Early blocks, so that later blocks move up.
    pruned = prune(decoder(name), settings_of(rate=0.3, last_layer=3), samples_of())
    dropped = pruned.dropped_blocks
    assert list(pruned.block_scores) == [0, 1, 2, 3]
    assert len(dropped) >= 2
    ranked = sorted(pruned.block_scores, key=pruned.block_scores.__getitem__)
    assert list(dropped) == sorted(ranked[: len(dropped)])
    assert pruned.model.config.num_hidden_layers == NUM_BLOCKS - len(dropped)
    assert not pruned.model.config.is_heterogeneous
    assert pruned.kept == {}, "a plain checkpoint"
    expected = logits_of(skip_blocks(decoder(name), dropped))
    torch.testing.assert_close(logits_of(pruned.model), expected, rtol=1e-5, atol=1e-5)


# ---- compensation


def front_of(name: str) -> str:
    """Return the path of the MLP output projection of block 2."""
    return f"{BLOCKS.get(name, 'model.layers')}.2.{OUTPUTS.get(name, LLAMA_OUTPUTS)[1]}"


@torch.no_grad()
def compensated_by_hand(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Solve the output projection of block 2 so that it adds what blocks 3 and 4 add."""
    added: list[torch.Tensor] = []

    def add(sign: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            added.append(sign * states[0])

        return hook

    blocks_of(model)[2].register_forward_hook(add(-1))
    blocks_of(model)[4].register_forward_hook(add(1))
    features = stacked_inputs(model, front_of(name), samples_of())
    target = (torch.cat(added[1::2]) + torch.cat(added[::2])).double()
    target /= 0.4 if name == "granite" else 1.0
    gram = features.T @ features
    gram += 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
    weight = model.get_parameter(f"{front_of(name)}.weight").double()
    return weight + torch.linalg.solve(gram, features.T @ target).T


@pytest.mark.parametrize("name", ["llama", "granite", "opt", "gpt_neox"])
def test_the_block_before_adds_what_dropped_blocks_added(name: str) -> None:
    """It is solved by least squares over the calibration tokens without padding; nothing else
    changes."""
    model = decoder(name)
    compensate_blocks(model, {3, 4}, (1, 2, 3, 4), 0.05, samples_of())
    expected = decoder(name).state_dict()
    front = f"{front_of(name)}.weight"
    assert not torch.equal(model.get_parameter(front), expected[front])
    expected[front] = compensated_by_hand(decoder(name), name).float()
    torch.testing.assert_close(model.get_parameter(front), expected[front], rtol=1e-3, atol=1e-4)
    assert same(model.state_dict() | {front: expected[front]}, expected)


@pytest.mark.parametrize(
    ("gone", "layers"), [({0, 1}, range(6)), ({3, 4}, (3, 4, 5)), (set(), range(6))]
)
def test_no_block_outside_the_range_is_changed(gone: set[int], layers: Sequence[int]) -> None:
    model = decoder()
    compensate_blocks(model, gone, layers, 0.05, samples_of())
    assert same(model.state_dict(), decoder().state_dict())


def test_no_compensation_with_a_norm_after_the_mlp() -> None:
    model = decoder("gemma2")
    asked = PruneConfig(rate=0.3, units=("block",), compensation="least_squares")
    with pytest.raises(UserError, match=r"least_squares cannot make up .* of a gemma2 model"):
        planned_cut(model.config, asked)
    default = PruneConfig(rate=0.3, units=("block",))
    assert settled(model.config, default).compensates_by == "none"
    before = logits_of(model)
    compensate_blocks(model, {2, 4}, range(NUM_BLOCKS), 0.3, samples_of())
    assert torch.equal(logits_of(model), before), "blocks are dropped without compensation"
    assert logits_of(prune(model, default, samples_of()).model).isfinite().all()


@pytest.mark.parametrize(("selection", "depth_share"), [("per_layer", 0.5), ("global", 0.6)])
def test_blocks_and_units_together_meet_the_rate(selection: str, depth_share: float) -> None:
    base = decoder()
    before = num_parameters(base)
    block = num_parameters(base.model.layers[0])
    units = ["block", "attention", "mlp"]
    settings = settings_of(rate=0.5, units=units, selection=selection, depth_share=depth_share)
    pruned = prune(decoder(), settings, samples_of())
    dropped = pruned.dropped_blocks
    assert abs(num_parameters(pruned.model) - 0.5 * before) <= 3 * 32, "a channel"
    assert abs(len(dropped) * block - depth_share * 0.5 * before) <= block / 2
    assert 1 in dropped
    # Kept units are listed by block of the base model.
    assert set(pruned.kept) == set(pruned.scores) == set(range(NUM_BLOCKS)) - set(dropped)
    for new, old in enumerate(sorted(pruned.kept)):
        up = base.model.layers[old].mlp.up_proj.weight[list(pruned.kept[old]["mlp"])]
        assert torch.equal(pruned.model.model.layers[new].mlp.up_proj.weight, up)


@pytest.mark.parametrize(("rate", "number"), [(0.08, 1), (0.2, 2), (0.5, 2)])
def test_default_depth_share_is_half_but_at_most_a_tenth(rate: float, number: int) -> None:
    """Each of twenty blocks has about a twentieth of all parameters."""
    model = tiny("llama", num_hidden_layers=20)
    block = num_parameters(model.model.layers[0]) / num_parameters(model)
    pruned = prune(model, settings_of(rate=rate, units=["block", "mlp"]), samples_of())
    assert len(pruned.dropped_blocks) == round(min(rate / 2, 0.1) / block) == number


@pytest.mark.parametrize("options", ["units: [block]", f"{ALL_UNITS}, depth_share: 0.9"])
@pytest.mark.parametrize("small", [(0, 2, 4), (1, 2, 3, 4, 5)], ids=str)
def test_blocks_of_different_sizes_count_for_what_they_have(
    small: tuple[int, ...], options: str
) -> None:
    """A base may have been pruned before; no other number of dropped blocks would be nearer."""
    model = cut_units(decoder(), {index: {"mlp": (0, 1)} for index in small})
    before = num_parameters(model)
    sizes = [num_parameters(block) for block in model.model.layers]
    assert max(sizes) > 2 * min(sizes)
    settings = settings_of(rate=0.35, **keys(options))
    pruned = prune(model, settings, samples_of())
    order = sorted(pruned.block_scores, key=pruned.block_scores.__getitem__)
    possible = [0, *itertools.accumulate(sizes[index] for index in order[:-1])]
    if "mlp" in options:
        possible = [gone for gone in possible if gone <= 0.35 * before]
    target = settings.block_rate * before
    removed = sum(sizes[index] for index in pruned.dropped_blocks)
    assert removed == min(possible, key=lambda gone: abs(gone - target))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rate: 0.9, first_layer: 1", "the 5 blocks that may be dropped"),
        ("rate: 0.3, first_layer: 3, last_layer: 3", "only one block may be dropped"),
        # The nearest number is one block, but it has more parameters than the rate allows.
        ("rate: 0.1, units: [block, mlp], depth_share: 0.95", "raise the rate or `prune.depth_sha"),
        (
            "rate: 0.5, units: [block, mlp], depth_share: 0.4, first_layer: 2",
            "parameters from blocks, .* name more `prune.units`$",
        ),
    ],
)
def test_a_rate_that_no_number_of_blocks_meets_is_refused(options: str, message: str) -> None:
    """The error is the same before and after the weights are read."""
    model = decoder()
    settings = settings_of(**keys(options))
    with pytest.raises(UserError, match=message):
        planned_cut(model.config, settings)
    with pytest.raises(UserError, match=message):
        prune(model, settings, samples_of())


def test_cuts_that_share_their_scores_equal_each_made_alone(tmp_path: Path) -> None:
    """Also with the scores that a cut saved, whose blocks have the numbers of the base model."""
    works: list[str] = []

    def cut(rate: float, first: FirstScores | None) -> Pruned:
        settings = settings_of(units=["block", "mlp"], rate=rate, depth_share=0.6)
        works.clear()
        report = lambda work, *_: works.append(work)  # noqa: E731
        return prune(decoder(), settings, samples_of(), on_work=report, first=first)

    shared = FirstScores()
    for rate in (0.5, 0.45, 0.3):
        alone = cut(rate, None)
        save_importance(tmp_path, alone.scores, alone.block_scores)
        saved = FirstScores()
        saved.add(load_importance(tmp_path), alone.dropped_blocks)
        along = cut(rate, shared)
        again = cut(rate, saved)
        assert not [
            work for work in works if work.startswith("importance") and "step 2" not in work
        ]
        for other in (along, again):
            assert other.kept == alone.kept
            assert other.dropped_blocks == alone.dropped_blocks
            assert same(other.model.state_dict(), alone.model.state_dict())
    assert len(shared.units) < 3, "two of the rates drop the same blocks"
