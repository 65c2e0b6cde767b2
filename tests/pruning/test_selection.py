"""Which units stay: if this broke, a rate of 20 % would be some other rate, or a block would lose its last head."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qpruner.config.schema import PruneConfig
from qpruner.errors import UserError
from qpruner.pruning.allocation import counts_per_layer
from qpruner.pruning.selection import select, select_rate, units_at_rate
from qpruner.pruning.settings import cuttable_layers
from qpruner.pruning.units import Kept, KindSize, Sizes, available

Values = dict[int, dict[str, list[float]]]
SELECTIONS = ["per_layer", "global"]
REMEDY = "lower the rate, widen"


def sizes_of(num_layers: int, attention: tuple[int, int] | None = None, mlp: tuple[int, int] | None = None) -> Sizes:
    """Blocks that are all alike, from (parameters, count) by kind; counted from 3, as behind `first_layer: 3`."""
    one = {}
    if attention:
        one["attention"] = KindSize(*attention)
    if mlp:
        one["mlp"] = KindSize(*mlp)
    return {index: dict(one) for index in range(3, 3 + num_layers)}


def random_sizes(generator: np.random.Generator) -> Sizes:
    """Units of a random but possible decoder, from tiny to Llama's, 1 to 40 blocks of it."""
    head_dim, heads_per_group = int(generator.choice([16, 64, 128])), int(generator.choice([1, 2, 4, 8]))
    groups = int(generator.integers(2, 33))
    hidden = max(64, head_dim * heads_per_group * groups)
    channels = int(hidden * generator.uniform(1.5, 5.0))
    return sizes_of(
        int(generator.integers(1, 41)),
        attention=(hidden * head_dim * (2 * heads_per_group + 2), groups),
        mlp=(3 * hidden, channels),
    )


def smollm_sizes(generator: np.random.Generator) -> Sizes:
    """A few blocks like those of SmolLM2-135M: two to five large key/value groups beside small channels."""
    return sizes_of(
        int(generator.integers(2, 6)),
        attention=(64 * 576 * 8, int(generator.integers(2, 6))),
        mlp=(3 * 576, int(generator.integers(900, 1600))),
    )


def random_scores(generator: np.random.Generator, sizes: Sizes, weight_of_heads: float = 1.0) -> Values:
    """Gamma-distributed; heads matter `weight_of_heads` times as much a parameter as channels."""
    return {
        index: {
            kind: (
                generator.gamma(2.0, 1.0, size.count * size.partitions)
                * (weight_of_heads * size.parameters / kinds["mlp"].parameters if kind == "attention" else 1.0)
            ).tolist()
            for kind, size in kinds.items()
        }
        for index, kinds in sizes.items()
    }


def parameters_of(counts: dict[int, dict[str, int]], sizes: Sizes) -> int:
    return sum(
        number * sizes[index][kind].parameters for index, kinds in counts.items() for kind, number in kinds.items()
    )


def removed_by(kept: Kept, sizes: Sizes) -> int:
    return sum(
        (size.count * size.partitions - len(kept[index][kind])) * size.parameters // size.partitions
        for index, kinds in sizes.items()
        for kind, size in kinds.items()
    )


def channels_kept(kept: Kept) -> list[int]:
    return [len(kinds["mlp"]) for kinds in kept.values()]


def spread(counts: dict[int, dict[str, int]], kind: str) -> int:
    """By how much the blocks differ."""
    numbers = [kinds[kind] for kinds in counts.values()]
    return max(numbers) - min(numbers)


# ---- the rate


@pytest.mark.parametrize("seed", range(20))
def test_the_asked_share_goes_to_within_one_channel(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = random_sizes(generator)
    target = int(available(sizes) * generator.uniform(0.01, 0.8))
    counts = counts_per_layer(sizes, target)
    assert abs(target - parameters_of(counts, sizes)) <= sizes[3]["mlp"].parameters
    assert list(counts) == list(sizes)
    assert all(0 <= counts[index][kind] < size.count for index, kinds in sizes.items() for kind, size in kinds.items())
    assert spread(counts, "mlp") <= 1
    assert spread(counts, "attention") <= 1


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("channels", [640, 600])
@pytest.mark.parametrize("round_to", [32, 128])
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_what_stays_is_a_multiple_of_round_to(selection: str, channels: int, round_to: int, rate: float) -> None:
    """Also when the base model's own width is none."""
    sizes = sizes_of(4, attention=(20000, 3), mlp=(60, channels))
    target = int(rate * available(sizes))
    scores = random_scores(np.random.default_rng(0), sizes, weight_of_heads=5.0)
    kept = select(scores, sizes, target, selection, round_to)
    assert abs(target - removed_by(kept, sizes)) <= round_to * sizes[3]["mlp"].parameters
    assert all(width % round_to == 0 and width > 0 for width in channels_kept(kept) if width != channels)
    assert any(width != channels for width in channels_kept(kept))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("weight_of_heads", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(7))
def test_every_block_keeps_a_unit_of_each_kind(selection: str, weight_of_heads: float, seed: int) -> None:
    """However the scores fall: heads that matter most of all still go where channels cannot make up the rate."""
    generator = np.random.default_rng(seed)
    sizes = smollm_sizes(generator)
    scores = random_scores(generator, sizes, weight_of_heads)
    target = int(available(sizes) * generator.uniform(0.05, 0.75))
    kept = select(scores, sizes, target, selection)
    assert list(kept) == list(scores)
    for index, kinds in kept.items():
        assert list(kinds) == ["attention", "mlp"]
        for kind, units in kinds.items():
            assert len(units) >= 1
            assert list(units) == sorted(set(units))
            assert set(units) <= set(range(len(scores[index][kind])))
    assert abs(target - removed_by(kept, sizes)) <= sizes[3]["mlp"].parameters


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rate", [0.18, 0.3, 0.5])
def test_heads_alone_go_to_the_nearest_number(selection: str, rate: float) -> None:
    """SmolLM2's attention: not every rate is possible, but none nearer than what goes."""
    size = 64 * 576 * 8
    sizes = sizes_of(5, attention=(size, 3))
    scores = {index: {"attention": [3.0, 1.0, 2.0]} for index in sizes}
    target = int(rate * available(sizes))
    kept = select(scores, sizes, target, selection)
    assert abs(target - removed_by(kept, sizes)) <= size / 2
    assert all({0} <= set(kinds["attention"]) <= {0, 1, 2} for kinds in kept.values())
    assert all(1 not in kinds["attention"] for kinds in kept.values() if len(kinds["attention"]) < 3)
    # What does not divide evenly is spread over the blocks.
    numbers = [len(kinds["attention"]) for kinds in kept.values()]
    assert max(numbers) - min(numbers) <= (1 if selection == "per_layer" else 2)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_more_than_the_blocks_have_is_refused(selection: str) -> None:
    sizes = sizes_of(2, attention=(2000, 2), mlp=(60, 50))
    scores = random_scores(np.random.default_rng(0), sizes)
    everything = available(sizes)
    for target in (everything, everything + 1, everything - 100):
        with pytest.raises(UserError, match=REMEDY) as caught:
            select(scores, sizes, target, selection)
        assert f"{target:,} parameters to go, but at most {2 * (2000 + 49 * 60):,} can" in str(caught.value)
    assert removed_by(select(scores, sizes, 2 * (2000 + 49 * 60), selection), sizes) == 2 * (2000 + 49 * 60)


# ---- which


@pytest.mark.parametrize("seed", range(3))
def test_the_least_important_go_first_in_every_block(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = sizes_of(4, attention=(2000, 4), mlp=(60, 200))
    scores = random_scores(generator, sizes)
    kept = select(scores, sizes, int(0.3 * available(sizes)), "per_layer")
    for index, kinds in scores.items():
        for kind, values in kinds.items():
            gone = set(range(len(values))) - set(kept[index][kind])
            assert gone
            assert max(values[unit] for unit in gone) <= min(values[unit] for unit in kept[index][kind])


@pytest.mark.parametrize("seed", range(3))
def test_global_selection_takes_the_least_important_anywhere(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = sizes_of(4, attention=(2000, 4), mlp=(60, 200))
    scores = random_scores(generator, sizes, weight_of_heads=0.1)
    # The first block matters least, so it must lose more than the last.
    for kind in ("attention", "mlp"):
        scores[3][kind] = [value / 20 for value in scores[3][kind]]
    kept = select(scores, sizes, int(0.3 * available(sizes)), "global")
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
    sizes = {0: {"attention": KindSize(1000, 2), "mlp": KindSize(10, 300)}}
    cheap_head = {0: {"attention": [900.0, 5.0], "mlp": [1.0] * 300}}
    dear_head = {0: {"attention": [900.0, 500.0], "mlp": [1.0] * 300}}
    assert select(cheap_head, sizes, 1000, "global")[0]["attention"] == (0,)
    assert select(dear_head, sizes, 1000, "global")[0]["attention"] == (0, 1)


def test_channels_come_back_when_a_head_has_to_go() -> None:
    """Channels alone fall short of 1200; the head that must go is worth 100 of them, and the dearest channels stay."""
    sizes = {0: {"attention": KindSize(1000, 2), "mlp": KindSize(10, 100)}}
    scores = {0: {"attention": [1e9, 1e8], "mlp": [float(unit) for unit in range(100)]}}
    kept = select(scores, sizes, 1200, "global")
    assert kept[0] == {"attention": (0,), "mlp": tuple(range(20, 100))}


@pytest.mark.parametrize("selection", ["global", "per_layer"])
@pytest.mark.parametrize("seed", range(20))
def test_nothing_comes_back_after_a_step_that_took_too_much(seed: int, selection: str) -> None:
    """A head is worth several steps here: once it went, there are steps with nothing to do."""
    generator = np.random.default_rng(seed)
    sizes = {
        index: {"attention": KindSize(int(generator.integers(50, 400)), 4), "mlp": KindSize(10, 12)}
        for index in range(2)
    }
    target, steps = int(available(sizes) * generator.uniform(0.1, 0.6)), int(generator.integers(3, 9))
    alive = {index: {name: tuple(range(size.count)) for name, size in kinds.items()} for index, kinds in sizes.items()}
    for step in range(1, steps + 1):
        scores: Values = {
            index: {
                name: [
                    generator.random() if unit in alive[index][name] else float("-inf") for unit in range(size.count)
                ]
                for name, size in kinds.items()
            }
            for index, kinds in sizes.items()
        }
        kept = select(scores, sizes, target, selection, progress=step / steps)
        for index, kinds in kept.items():
            for name, units in kinds.items():
                assert set(units) <= set(alive[index][name])
        alive = kept
    assert abs(removed_by(alive, sizes) - target) <= max(kinds["attention"].parameters for kinds in sizes.values())


# ---- every block alike


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("expert", "attention"), ("attention",)], ids=str)
@pytest.mark.parametrize("seed", range(7))
def test_no_uniform_widths_are_nearer(seed: int, kinds: tuple[str, ...]) -> None:
    """Against every combination; one that is half a unit of every block off may be passed over for a more even one."""
    generator = np.random.default_rng(seed)
    plain = tuple(sorted({int(count) for count in generator.integers(1, 12, 4)} | {12}))
    every = {
        "expert": KindSize(int(generator.integers(5000, 90000)), 8, least=2),
        "attention": KindSize(int(generator.integers(1000, 30000)), 12, plain=plain),
        "mlp": KindSize(int(generator.integers(5, 100)), 64 * 10),
    }
    sizes = {index: {kind: every[kind] for kind in kinds} for index in range(5)}
    stays = {"expert": range(2, 9), "attention": plain, "mlp": range(64, 64 * 10 + 1, 64)}
    possible = [
        5 * sum((every[kind].count - count) * every[kind].parameters for kind, count in zip(kinds, counts, strict=True))
        for counts in itertools.product(*(stays[kind] for kind in kinds))
    ]
    target = int(max(possible) * generator.uniform(0.05, 0.95))
    counts = counts_per_layer(sizes, target, 64, uniform=True)
    assert len({tuple(of_block.items()) for of_block in counts.values()}) == 1
    removed = parameters_of(counts, sizes)
    one = min(every[kind].parameters * (64 if kind == "mlp" else 1) for kind in kinds)
    assert abs(removed - target) <= max(5 * one / 2, min(abs(each - target) for each in possible))


SMOLLM2 = (3, 64 * 576 * 8, 1536, 3 * 576, 30, 134_515_008, (1, 2, 3))
LLAMA_2_7B = (32, 4 * 128 * 4096, 11008, 3 * 4096, 32, 6_738_415_616, (1, 2, 4, 8, 16, 32))


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_2_7B], ids=["SmolLM2-135M", "Llama-2-7B"])
def test_uniform_heads_lose_at_most_the_share(shape: Any) -> None:
    """Which of the nearest widths hits a rate most closely is chance: half of all heads went for 0.1 % of the rate."""
    heads, head, channels, channel, blocks, parameters, plain = shape
    kinds = {"attention": KindSize(head, heads, plain=plain), "mlp": KindSize(channel, channels)}
    sizes = dict.fromkeys(range(blocks), kinds)
    before = 0
    for rate in np.arange(0.02, 0.5, 0.02):
        target = int(rate * parameters)
        counts = counts_per_layer(sizes, target, 64, uniform=True)[0]
        assert counts["attention"] / heads <= target / available(sizes)
        assert heads - counts["attention"] == min(
            each for each in plain if each >= heads * (1 - target / available(sizes))
        )
        assert counts["attention"] >= before
        before = counts["attention"]


def test_too_few_plain_heads_are_refused() -> None:
    """A silent cut of half as much would be taken for the one that was asked for."""
    sizes = {index: {"attention": KindSize(1000, 8, plain=(4, 8)), "mlp": KindSize(10, 100)} for index in range(2)}
    with pytest.raises(UserError, match=r"at most 9,980 can .* 4 key/value groups, .*`uniform: false`"):
        counts_per_layer(sizes, 2 * 7000, uniform=True)


# ---- experts


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_expert_keeps_its_own_channels_of_one_number(selection: str) -> None:
    """Stacked experts have one shape: each may keep other channels, none more of them."""
    generator = np.random.default_rng(0)
    sizes = {index: {"attention": KindSize(900, 3), "mlp": KindSize(40, 32, partitions=4)} for index in range(3)}
    scores = random_scores(generator, sizes)
    target = int(0.3 * available(sizes))
    kept = select(scores, sizes, target, selection, round_to=8)
    assert abs(target - removed_by(kept, sizes)) <= 40 * 8
    for index, kinds in kept.items():
        by_expert = [[unit % 32 for unit in kinds["mlp"] if unit // 32 == expert] for expert in range(4)]
        assert len({len(channels) for channels in by_expert}) == 1
        assert len(by_expert[0]) % 8 == 0 and len(by_expert[0]) >= 8
        if len(by_expert[0]) < 32:
            assert len({tuple(channels) for channels in by_expert}) > 1
        for expert, channels in enumerate(by_expert):
            values = scores[index]["mlp"][expert * 32 : (expert + 1) * 32]
            gone = [values[channel] for channel in range(32) if channel not in channels]
            assert not gone or max(gone) <= min(values[channel] for channel in channels)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_a_token_finds_as_many_experts_as_it_is_sent_to(selection: str, rate: float) -> None:
    sizes = {index: {"attention": KindSize(900, 4), "expert": KindSize(3000, 8, least=6)} for index in range(3)}
    scores: Values = {index: {"attention": [9.0] * 4, "expert": [float(unit) for unit in range(8)]} for index in sizes}
    target = min(int(rate * available(sizes)), 3 * (3 * 900 + 2 * 3000))
    kept = select(scores, sizes, target, selection)
    assert all(len(kinds["expert"]) >= 6 for kinds in kept.values())
    assert abs(target - removed_by(kept, sizes)) <= 900
    assert all(kinds["expert"][-1] == 7 for kinds in kept.values())


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("target", range(0, 20000, 2300))
def test_the_nearest_goes_where_channels_can_give_nothing(target: int, uniform: bool) -> None:
    """`round_to` as wide as the MLP: heads alone, 3000 parameters each, in all three blocks at once where uniform."""
    sizes = sizes_of(3, (3000, 3), (180, 40))
    removed = parameters_of(counts_per_layer(sizes, target, round_to=40, uniform=uniform), sizes)
    step = 9000 if uniform else 3000
    assert removed % step == 0
    assert abs(removed - target) <= step / 2 + 180 * 40 / 2
    if uniform:
        assert abs(removed - target) <= step / 2


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3, 0.5])
def test_experts_and_attention_meet_the_rate_and_share_it(rate: float) -> None:
    """Mixtral-8x7B: experts 34 times as large as key/value groups, which could not make up for one less a block."""
    expert, group = 3 * 4096 * 14336 + 4096, 4096 * 128 * 10
    sizes = {index: {"attention": KindSize(group, 8), "expert": KindSize(expert, 8, least=2)} for index in range(32)}
    target = int(rate * available(sizes))
    counts = counts_per_layer(sizes, target)
    assert abs(target - parameters_of(counts, sizes)) <= group
    assert spread(counts, "expert") <= 1
    assert all(kinds["attention"] <= 8 * rate + 3 for kinds in counts.values()), "it does not stand in for experts"


# ---- each block's own share


@pytest.mark.parametrize(
    ("rows", "count", "rate", "removed"),
    [
        # 3 heads of 64: `(192 - int(192 * (1 - rate))) // 64`.
        (64, 3, 0.2, 0),
        (64, 3, 0.328, 0),
        (64, 3, 0.329, 1),
        (64, 3, 0.66, 1),
        (64, 3, 0.67, 2),
        # 32 heads of 128, and 11008 channels: Llama-2-7B.
        (128, 32, 0.25, 8),
        (128, 32, 0.2, 6),
        (1, 11008, 0.25, 2752),
        (1, 11008, 0.2, 2202),
        (1, 1536, 0.001, 2),
        (64, 1, 0.9, 0),
    ],
)
def test_a_blocks_own_share_is_counted_as_published(rows: int, count: int, rate: float, removed: int) -> None:
    assert units_at_rate(KindSize(7, count, rows=rows), rate) == removed


@pytest.mark.parametrize(("rate", "stays"), [(0.2, 192), (0.3, 192), (0.4, 128), (0.5, 128), (0.95, 64), (0.05, 256)])
def test_a_blocks_own_share_is_rounded_to_a_multiple(rate: float, stays: int) -> None:
    assert 256 - units_at_rate(KindSize(7, 256), rate, round_to=64) == stays


@pytest.mark.parametrize(
    ("name", "size", "rate", "bound"),
    [
        ("mlp", KindSize(7, 40), 0.976, 0.975),
        ("attention", KindSize(7, 4, rows=8), 0.99, 0.968),
        ("expert", KindSize(7, 8, least=2), 0.8, 0.75),
    ],
)
def test_a_blocks_own_share_that_leaves_too_few_is_refused(
    name: str, size: KindSize, rate: float, bound: float
) -> None:
    """Not quietly made less; just below the bound that is told, it works."""
    scores: Values = {3: {name: [float(unit) for unit in range(size.count)]}}
    told = rf"{rate:g} would leave \d of the {size.count} {name} units of block 3, .* at most {bound:g}"
    with pytest.raises(UserError, match=told):
        select_rate(scores, {3: {name: size}}, rate)
    kept = select_rate(scores, {3: {name: size}}, bound - 1e-6)
    assert len(kept[3][name]) == size.least


def test_a_blocks_own_share_takes_its_least_important() -> None:
    sizes = {0: {"attention": KindSize(900, 4, rows=8), "mlp": KindSize(10, 10)}, 5: {"mlp": KindSize(10, 20)}}
    scores: Values = {
        0: {"attention": [4.0, 1.0, 3.0, 2.0], "mlp": [float(-unit) for unit in range(10)]},
        5: {"mlp": [float(unit) for unit in range(20)]},
    }
    assert select_rate(scores, sizes, 0.5) == {
        0: {"attention": (0, 2), "mlp": tuple(range(5))},
        5: {"mlp": tuple(range(10, 20))},
    }
    half_way = select_rate(scores, sizes, 0.5, progress=0.5)
    assert [len(half_way[0]["attention"]), len(half_way[0]["mlp"]), len(half_way[5]["mlp"])] == [3, 8, 15]


# ---- which blocks


@pytest.mark.parametrize(
    ("first", "last", "protected", "expected"),
    [
        (0, -1, (), range(0, 8)),
        (2, 5, (), range(2, 6)),
        (7, -1, (), range(7, 8)),
        (1, -2, (3, -4), (1, 2, 5, 6)),
    ],
)
def test_a_range_includes_both_ends_but_not_the_protected(
    first: int, last: int, protected: tuple[int, ...], expected: Any
) -> None:
    settings = PruneConfig(first_layer=first, last_layer=last, protected_layers=protected)
    assert cuttable_layers(SimpleNamespace(num_hidden_layers=8), settings) == tuple(expected)


@pytest.mark.parametrize(
    ("first", "last", "protected", "said"),
    [
        (8, -1, (), "8 blocks, 0 to 7"),
        (5, 4, (), "8 blocks, 0 to 7"),
        (0, -9, (), "8 blocks, 0 to 7"),
        (0, -1, (1, 12), "no block 12; the model has 8, 0 to 7"),
        (0, -1, (-9,), "no block -9; the model has 8, 0 to 7"),
        (2, 3, (2, -5), r"leaves no block that may be cut: name fewer, or widen `prune\.first_layer`"),
    ],
)
def test_blocks_outside_the_model_are_refused(first: int, last: int, protected: tuple[int, ...], said: str) -> None:
    settings = PruneConfig(first_layer=first, last_layer=last, protected_layers=protected)
    with pytest.raises(UserError, match=said):
        cuttable_layers(SimpleNamespace(num_hidden_layers=8), settings)
