"""Which units stay: if this broke, a rate of 20 % would be some other rate, or a block would lose its last head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qpruner.config import PruneConfig
from qpruner.errors import UserError
from qpruner.models.loading import load_dense
from qpruner.pruning.prune import num_parameters, prune
from qpruner.pruning.selection import (
    Kept,
    UnitSizes,
    counts_per_layer,
    layer_range,
    select_global,
    select_per_layer,
    unit_sizes,
)

Values = dict[int, dict[str, list[float]]]


def random_sizes(generator: np.random.Generator) -> tuple[UnitSizes, int]:
    """Units of a random but possible decoder, from tiny to Llama's, and how many blocks may be cut."""
    head_dim, heads_per_group = int(generator.choice([16, 64, 128])), int(generator.choice([1, 2, 4, 8]))
    groups = int(generator.integers(2, 33))
    hidden = max(64, head_dim * heads_per_group * groups)
    channels = int(hidden * generator.uniform(1.5, 5.0))
    return UnitSizes(
        parameters={"attention": hidden * head_dim * (2 * heads_per_group + 2), "mlp": 3 * hidden},
        count={"attention": groups, "mlp": channels},
    ), int(generator.integers(1, 41))


def available(sizes: UnitSizes, num_layers: int) -> int:
    return num_layers * sum(sizes.parameters[kind] * sizes.count[kind] for kind in ("attention", "mlp"))


def random_scores(generator: np.random.Generator, sizes: UnitSizes, num_layers: int) -> Values:
    return {
        index: {kind: generator.gamma(2.0, 1.0, count).tolist() for kind, count in sizes.count.items()}
        for index in range(3, 3 + num_layers)
    }


def channels_kept(kept: Kept) -> list[int]:
    return [len(kinds["mlp"]) for kinds in kept.values()]


def removed_by(kept: Kept, scores: Values, sizes: UnitSizes) -> int:
    return sum(
        (len(values) - len(kept[index][kind])) * sizes.parameters[kind]
        for index, kinds in scores.items()
        for kind, values in kinds.items()
    )


@pytest.mark.parametrize("seed", range(300))
def test_the_asked_share_goes_to_within_one_channel(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes, num_layers = random_sizes(generator)
    target = int(available(sizes, num_layers) * generator.uniform(0.01, 0.8))
    counts = counts_per_layer(target, sizes, num_layers)
    removed = num_layers * counts.attention * sizes.parameters["attention"] + sum(counts.mlp) * sizes.parameters["mlp"]
    assert abs(target - removed) <= sizes.parameters["mlp"]
    assert 0 <= counts.attention < sizes.count["attention"]
    assert len(counts.mlp) == num_layers
    assert all(0 <= channels < sizes.count["mlp"] for channels in counts.mlp)
    assert max(counts.mlp) - min(counts.mlp) <= 1


@pytest.mark.parametrize("round_to", [8, 64])
@pytest.mark.parametrize("seed", range(40))
def test_rounded_widths_cost_at_most_one_bundle(seed: int, round_to: int) -> None:
    generator = np.random.default_rng(seed)
    sizes, num_layers = random_sizes(generator)
    sizes.count["mlp"] -= sizes.count["mlp"] % round_to  # type: ignore[index]
    target = int(available(sizes, num_layers) * generator.uniform(0.01, 0.5))
    counts = counts_per_layer(target, sizes, num_layers, round_to)
    removed = num_layers * counts.attention * sizes.parameters["attention"] + sum(counts.mlp) * sizes.parameters["mlp"]
    assert abs(target - removed) <= sizes.parameters["mlp"] * round_to
    assert all((sizes.count["mlp"] - channels) % round_to == 0 for channels in counts.mlp)


@pytest.mark.parametrize("select", [select_per_layer, select_global])
@pytest.mark.parametrize("channels", [640, 600])
def test_what_stays_is_a_multiple_of_round_to(select: object, channels: int) -> None:
    """Also when the base model's own width is none."""
    sizes = UnitSizes({"attention": 20000, "mlp": 60}, {"attention": 3, "mlp": channels})
    scores = random_scores(np.random.default_rng(0), sizes, 4)
    target = int(0.4 * available(sizes, 4))
    kept = select(scores, target, sizes, 64)  # type: ignore[operator]
    assert abs(target - removed_by(kept, scores, sizes)) <= 64 * sizes.parameters["mlp"]
    assert all(width % 64 == 0 and width > 0 for width in channels_kept(kept) if width != channels)


def test_a_multiple_wider_than_the_block_is_refused() -> None:
    sizes = UnitSizes({"attention": 2000, "mlp": 60}, {"attention": 2, "mlp": 50})
    with pytest.raises(UserError, match="at most the 50 MLP channels of a block, got 64"):
        counts_per_layer(1000, sizes, 2, round_to=64)


@pytest.mark.parametrize(
    ("parameters", "count", "num_layers", "rate"),
    [
        # Two large key/value groups and a small MLP: half of the attention is more than all that is to go.
        ({"attention": 6000, "mlp": 30}, {"attention": 2, "mlp": 300}, 4, 0.26),
        # SmolLM2-135M: 3 key/value groups.
        ({"attention": 64 * 576 * 8, "mlp": 3 * 576}, {"attention": 3, "mlp": 1536}, 30, 0.2),
    ],
)
def test_coarse_attention_units_do_not_overshoot(
    parameters: dict[str, int], count: dict[str, int], num_layers: int, rate: float
) -> None:
    sizes = UnitSizes(parameters, count)
    target = int(rate * available(sizes, num_layers))
    counts = counts_per_layer(target, sizes, num_layers)
    removed = num_layers * counts.attention * parameters["attention"] + sum(counts.mlp) * parameters["mlp"]
    assert abs(target - removed) <= parameters["mlp"]


def test_a_rate_between_what_units_can_make_up_is_refused() -> None:
    """All channels are less than what is to go, and one key/value group of every block is more."""
    sizes = UnitSizes({"attention": 6000, "mlp": 30}, {"attention": 2, "mlp": 150})
    with pytest.raises(UserError, match="lower the rate or widen"):
        counts_per_layer(19800, sizes, 4)


@pytest.mark.parametrize("select", [select_per_layer, select_global])
@pytest.mark.parametrize("seed", range(20))
def test_every_block_keeps_a_unit_of_each_kind(select: object, seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = UnitSizes(
        {"attention": 64 * 576 * 8, "mlp": 3 * 576},
        {"attention": int(generator.integers(2, 6)), "mlp": int(generator.integers(900, 1600))},
    )
    num_layers = int(generator.integers(2, 6))
    scores = random_scores(generator, sizes, num_layers)
    target = int(available(sizes, num_layers) * generator.uniform(0.05, 0.7))
    kept = select(scores, target, sizes)  # type: ignore[operator]
    assert list(kept) == list(scores)
    for index, kinds in kept.items():
        for kind, units in kinds.items():
            assert len(units) >= 1
            assert list(units) == sorted(set(units))
            assert set(units) <= set(range(len(scores[index][kind])))
    assert abs(target - removed_by(kept, scores, sizes)) <= sizes.parameters["mlp"]


@pytest.mark.parametrize("seed", range(5))
def test_the_least_important_go_first_in_every_block(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = UnitSizes({"attention": 2000, "mlp": 60}, {"attention": 4, "mlp": 200})
    scores = random_scores(generator, sizes, 4)
    kept = select_per_layer(scores, int(0.3 * available(sizes, 4)), sizes)
    for index, kinds in scores.items():
        for kind, values in kinds.items():
            gone = set(range(len(values))) - set(kept[index][kind])
            assert gone
            assert max(values[unit] for unit in gone) <= min(values[unit] for unit in kept[index][kind])


@pytest.mark.parametrize("seed", range(5))
def test_a_global_selection_takes_the_least_important_wherever_they_are(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = UnitSizes({"attention": 2000, "mlp": 60}, {"attention": 4, "mlp": 200})
    scores = random_scores(generator, sizes, 4)
    # The first block matters least, so it must lose more than the last.
    for kind in ("attention", "mlp"):
        scores[3][kind] = [value / 20 for value in scores[3][kind]]
    kept = select_global(scores, int(0.3 * available(sizes, 4)), sizes)
    for kind in ("attention", "mlp"):
        gone = [
            value for index in scores for unit, value in enumerate(scores[index][kind]) if unit not in kept[index][kind]
        ]
        # Only a block's last unit may be less important than what went elsewhere.
        stays = [
            scores[index][kind][unit] for index in scores for unit in kept[index][kind] if len(kept[index][kind]) > 1
        ]
        assert max(gone) <= min(stays)
    assert len(kept[3]["mlp"]) < len(kept[6]["mlp"])


def test_attention_and_channels_compete_per_parameter() -> None:
    """A unit a hundred times as large has to matter a hundred times as much to stay."""
    sizes = UnitSizes({"attention": 1000, "mlp": 10}, {"attention": 2, "mlp": 300})
    cheap_head = {0: {"attention": [900.0, 5.0], "mlp": [1.0] * 300}}
    dear_head = {0: {"attention": [900.0, 500.0], "mlp": [1.0] * 300}}
    assert select_global(cheap_head, 1000, sizes)[0]["attention"] == (0,)
    assert select_global(dear_head, 1000, sizes)[0]["attention"] == (0, 1)


@pytest.mark.parametrize("select", [select_per_layer, select_global])
def test_more_than_the_blocks_have_is_refused_with_what_to_do(select: object) -> None:
    sizes = UnitSizes({"attention": 2000, "mlp": 60}, {"attention": 2, "mlp": 50})
    scores = random_scores(np.random.default_rng(0), sizes, 2)
    everything = available(sizes, 2)
    for target in (everything, everything + 1, everything - 100):
        with pytest.raises(UserError, match="lower the rate or widen"):
            select(scores, target, sizes)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, -1, range(0, 8)), (2, 5, range(2, 6)), (3, 3, range(3, 4)), (7, -1, range(7, 8))],
)
def test_a_range_of_blocks_includes_both_ends(first: int, last: int, expected: range) -> None:
    assert layer_range(first, last, 8) == expected


@pytest.mark.parametrize(("first", "last"), [(8, -1), (0, 8), (5, 4), (0, -9), (3, -7)])
def test_a_range_outside_the_model_is_refused(first: int, last: int) -> None:
    with pytest.raises(UserError, match="8 blocks, 0 to 7"):
        layer_range(first, last, 8)


@pytest.mark.parametrize("selection", ["per_layer", "global"])
@pytest.mark.parametrize(("importance", "round_to"), [("magnitude", 1), ("taylor", 1), ("magnitude", 64)])
def test_the_model_loses_the_rate_that_was_asked(
    tiny_model: Path, selection: str, importance: str, round_to: int
) -> None:
    model = load_dense(str(tiny_model), "float32")
    channel = unit_sizes(model, 0).parameters["mlp"]
    before = num_parameters(model)
    rows = [{"input_ids": list(range(5, 25)), "labels": list(range(5, 25))}] * 2
    settings = PruneConfig.model_validate(
        {"rate": 0.15, "selection": selection, "importance": importance, "round_to": round_to}
    )
    pruned = prune(model, settings, rows, pad_id=1)
    assert pruned.parameters_before == before
    assert pruned.parameters_after == num_parameters(pruned.model)
    assert abs((before - pruned.parameters_after) - 0.15 * before) <= channel * round_to
    assert all(width % round_to == 0 for width in channels_kept(pruned.kept))


def test_blocks_outside_the_range_keep_their_weights(tiny_model: Path) -> None:
    model = load_dense(str(tiny_model), "float32")
    first = {name: value.clone() for name, value in model.model.layers[0].state_dict().items()}
    settings = PruneConfig(rate=0.1, importance="magnitude", first_layer=1, round_to=1)
    pruned = prune(model, settings, [], pad_id=1)
    after = pruned.model.model.layers[0].state_dict()
    assert all((after[name] == value).all() for name, value in first.items())
    assert list(pruned.kept) == [1]


def test_a_rate_of_zero_changes_nothing(tiny_model: Path) -> None:
    model = load_dense(str(tiny_model), "float32")
    pruned = prune(model, PruneConfig(rate=0.0), [], pad_id=1)
    assert pruned.model is model
    assert pruned.kept == {}
    assert pruned.parameters_before == pruned.parameters_after == num_parameters(model)
