"""Selection of units: the rate is met, and no block loses its last head."""

import itertools
from typing import Any

import numpy as np
import pytest

from qpruner.errors import UserError
from qpruner.pruning.allocation import counts_per_layer
from qpruner.pruning.selection import select, select_rate, units_at_rate
from qpruner.pruning.units import Kept, KindSize, Sizes, available

Values = dict[int, dict[str, list[float]]]
SELECTIONS = ["per_layer", "global"]


def sizes_of(num_layers: int, **kinds: KindSize) -> Sizes:
    """Make equal blocks, numbered from 3 as with `first_layer: 3`."""
    return {index: dict(kinds) for index in range(3, 3 + num_layers)}


def random_scores(
    generator: np.random.Generator, sizes: Sizes, weight_of_heads: float = 1.0
) -> Values:
    """Draw gamma-distributed scores; heads score `weight_of_heads` times as much per parameter as
    channels."""
    return {
        index: {
            kind: (
                generator.gamma(2.0, 1.0, size.count)
                * (
                    weight_of_heads * size.parameters / kinds["mlp"].parameters
                    if kind == "attention"
                    else 1.0
                )
            ).tolist()
            for kind, size in kinds.items()
        }
        for index, kinds in sizes.items()
    }


def parameters_of(counts: dict[int, dict[str, int]], sizes: Sizes) -> int:
    return sum(
        number * sizes[index][kind].parameters
        for index in counts
        for kind, number in counts[index].items()
    )


def removed_by(kept: Kept, sizes: Sizes) -> int:
    return sum(
        (size.count - len(kept[index][kind])) * size.parameters
        for index, kinds in sizes.items()
        for kind, size in kinds.items()
    )


def spread(counts: dict[int, dict[str, int]], kind: str) -> int:
    numbers = [kinds[kind] for kinds in counts.values()]
    return max(numbers) - min(numbers)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("channels", [640, 600])
@pytest.mark.parametrize("round_to", [32, 128])
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_what_stays_is_a_multiple_of_round_to(
    selection: str, channels: int, round_to: int, rate: float
) -> None:
    """This holds also if the base model has another width."""
    sizes = sizes_of(4, attention=KindSize(20000, 3), mlp=KindSize(60, channels))
    target = int(rate * available(sizes))
    scores = random_scores(np.random.default_rng(0), sizes, weight_of_heads=5.0)
    kept = select(scores, sizes, target, selection, round_to)
    assert abs(target - removed_by(kept, sizes)) <= round_to * 60
    cut = [len(kinds["mlp"]) for kinds in kept.values() if len(kinds["mlp"]) != channels]
    assert cut and all(width % round_to == 0 and width > 0 for width in cut)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("weight_of_heads", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(7))
def test_every_block_keeps_a_unit_of_each_kind(
    selection: str, weight_of_heads: float, seed: int
) -> None:
    """Even the most important heads are removed if channels cannot meet the rate."""
    generator = np.random.default_rng(seed)
    attention = KindSize(64 * 576 * 8, int(generator.integers(2, 6)))  # as in SmolLM2-135M
    mlp = KindSize(3 * 576, int(generator.integers(900, 1600)))
    sizes = sizes_of(int(generator.integers(2, 6)), attention=attention, mlp=mlp)
    scores = random_scores(generator, sizes, weight_of_heads)
    target = int(available(sizes) * generator.uniform(0.05, 0.75))
    kept = select(scores, sizes, target, selection)
    assert list(kept) == list(scores)
    for kinds in kept.values():
        for kind, size in {"attention": attention, "mlp": mlp}.items():
            assert len(kinds[kind]) >= 1 and list(kinds[kind]) == sorted(
                set(kinds[kind]) & set(range(size.count))
            )
    assert abs(target - removed_by(kept, sizes)) <= mlp.parameters
    counts = counts_per_layer(sizes, target)
    assert spread(counts, "mlp") <= 1 and spread(counts, "attention") <= 1


# ---- which


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_the_least_important_go_first(seed: int, selection: str) -> None:
    """With `global` the first block, which matters least, loses more than the last."""
    generator = np.random.default_rng(seed)
    sizes = sizes_of(4, attention=KindSize(2000, 4), mlp=KindSize(60, 200))
    scores = random_scores(generator, sizes, weight_of_heads=0.1)
    scores[3] = {kind: [value / 20 for value in values] for kind, values in scores[3].items()}
    kept = select(scores, sizes, int(0.3 * available(sizes)), selection)
    for kind in ("attention", "mlp"):
        values = {index: np.array(kinds[kind]) for index, kinds in scores.items()}
        gone = {index: np.delete(each, kept[index][kind]) for index, each in values.items()}
        stays = {index: each[list(kept[index][kind])] for index, each in values.items()}
        if selection == "per_layer":
            assert all(gone[index].max() <= stays[index].min() for index in values)
        else:  # only the last unit of a block may be less important than units removed elsewhere
            most = max(each.max() for each in gone.values() if len(each))
            assert most <= min(each.min() for each in stays.values() if len(each) > 1)
    assert (len(kept[3]["mlp"]) < len(kept[6]["mlp"])) == (selection == "global")


@pytest.mark.parametrize(
    ("heads", "channels", "target", "heads_kept", "channels_kept"),
    [
        # A unit a hundred times as large must score a hundred times as much to stay.
        ([900.0, 5.0], [1.0] * 300, 1000, (0,), 300),
        ([900.0, 500.0], [1.0] * 300, 1000, (0, 1), 200),
        # Channels alone fall short, so a head is removed, and the most important channels come
        # back.
        ([1e9, 1e8], [float(unit) for unit in range(100)], 1200, (0,), 80),
    ],
)
def test_heads_and_channels_compete_by_parameter(
    heads: list[float],
    channels: list[float],
    target: int,
    heads_kept: tuple[int, ...],
    channels_kept: int,
) -> None:
    sizes = {0: {"attention": KindSize(1000, 2), "mlp": KindSize(10, len(channels))}}
    kept = select({0: {"attention": heads, "mlp": channels}}, sizes, target, "global")[0]
    assert kept == {
        "attention": heads_kept,
        "mlp": tuple(range(len(channels) - channels_kept, len(channels))),
    }


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("seed", range(20))
def test_no_unit_returns_after_a_step_beyond_its_target(seed: int, selection: str) -> None:
    """A head has more parameters than several steps, so the steps after it remove nothing."""
    generator = np.random.default_rng(seed)
    sizes = sizes_of(
        2, attention=KindSize(int(generator.integers(50, 400)), 4), mlp=KindSize(10, 12)
    )
    target, steps = (
        int(available(sizes) * generator.uniform(0.1, 0.6)),
        int(generator.integers(3, 9)),
    )
    alive = {
        index: {name: tuple(range(size.count)) for name, size in kinds.items()}
        for index, kinds in sizes.items()
    }
    for step in range(1, steps + 1):
        scores: Values = {
            index: {
                name: [
                    generator.random() if unit in alive[index][name] else -np.inf
                    for unit in range(size.count)
                ]
                for name, size in kinds.items()
            }
            for index, kinds in sizes.items()
        }
        kept = select(scores, sizes, target, selection, progress=step / steps)
        assert all(
            set(units) <= set(alive[index][name])
            for index in kept
            for name, units in kept[index].items()
        )
        alive = kept
    assert abs(removed_by(alive, sizes) - target) <= sizes[3]["attention"].parameters


# ---- uniform widths


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("attention",)], ids=str)
@pytest.mark.parametrize("seed", range(7))
def test_no_uniform_widths_are_nearer(seed: int, kinds: tuple[str, ...]) -> None:
    """Compared with every combination; within half a unit per block, a more even one may win."""
    generator = np.random.default_rng(seed)
    plain = tuple(sorted({int(count) for count in generator.integers(1, 12, 4)} | {12}))
    every = {
        "attention": KindSize(int(generator.integers(1000, 30000)), 12, plain=plain),
        "mlp": KindSize(int(generator.integers(5, 100)), 64 * 10),
    }
    sizes = sizes_of(5, **{kind: every[kind] for kind in kinds})
    stays = {"attention": plain, "mlp": range(64, 64 * 10 + 1, 64)}
    possible = [
        5
        * sum(
            (every[kind].count - count) * every[kind].parameters
            for kind, count in zip(kinds, counts, strict=True)
        )
        for counts in itertools.product(*(stays[kind] for kind in kinds))
    ]
    target = int(max(possible) * generator.uniform(0.05, 0.95))
    counts = counts_per_layer(sizes, target, 64, uniform=True)
    assert len({tuple(of_block.items()) for of_block in counts.values()}) == 1
    one = min(every[kind].parameters * (64 if kind == "mlp" else 1) for kind in kinds)
    nearest = min(abs(each - target) for each in possible)
    assert abs(parameters_of(counts, sizes) - target) <= max(5 * one / 2, nearest)


SMOLLM2 = (3, 64 * 576 * 8, 1536, 3 * 576, 30, 134_515_008, (1, 2, 3))
LLAMA_2_7B = (32, 4 * 128 * 4096, 11008, 3 * 4096, 32, 6_738_415_616, (1, 2, 4, 8, 16, 32))


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_2_7B], ids=["SmolLM2-135M", "Llama-2-7B"])
def test_uniform_heads_lose_at_most_the_share(shape: Any) -> None:
    """Without this rule half of all heads were removed to come 0.1 % closer to the rate."""
    heads, head, channels, channel, blocks, parameters, plain = shape
    sizes = sizes_of(
        blocks, attention=KindSize(head, heads, plain=plain), mlp=KindSize(channel, channels)
    )
    for rate in np.arange(0.02, 0.5, 0.02):
        target = int(rate * parameters)
        gone = counts_per_layer(sizes, target, 64, uniform=True)[3]["attention"]
        assert heads - gone == min(
            each for each in plain if each >= heads * (1 - target / available(sizes))
        )


def test_too_few_plain_heads_are_refused() -> None:
    """A smaller cut without an error would be taken for the requested cut."""
    sizes = sizes_of(2, attention=KindSize(1000, 8, plain=(4, 8)), mlp=KindSize(10, 100))
    with pytest.raises(
        UserError, match=r"at most 9,980, .*loads without qpruner.*`uniform: false`"
    ):
        counts_per_layer(sizes, 2 * 7000, uniform=True)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("target", range(0, 20000, 2300))
def test_nearest_heads_where_channels_cannot_shrink(target: int, uniform: bool) -> None:
    """With `round_to` as wide as the MLP, only heads of 3000 parameters can be removed, if uniform
    in all blocks."""
    sizes = sizes_of(3, attention=KindSize(3000, 3), mlp=KindSize(180, 40))
    removed = parameters_of(counts_per_layer(sizes, target, round_to=40, uniform=uniform), sizes)
    step = 9000 if uniform else 3000
    assert removed % step == 0
    assert abs(removed - target) <= step / 2 + (0 if uniform else 180 * 40 / 2)


# ---- the same share of every block


@pytest.mark.parametrize(
    ("rows", "count", "rate", "round_to", "removed"),
    [
        # 3 heads of 64: `(192 - int(192 * (1 - rate))) // 64`.
        (64, 3, 0.328, 1, 0),
        (64, 3, 0.329, 1, 1),
        # 32 heads of 128, and 11008 channels: Llama-2-7B.
        (128, 32, 0.2, 1, 6),
        (1, 11008, 0.2, 1, 2202),
        # One unit stays, and the number of kept units is a multiple of `round_to`.
        (64, 1, 0.9, 1, 0),
        (1, 256, 0.4, 64, 128),
        (1, 256, 0.95, 64, 192),
        (1, 256, 0.05, 64, 0),
    ],
)
def test_layer_rate_counts_units_as_llm_pruner(
    rows: int, count: int, rate: float, round_to: int, removed: int
) -> None:
    assert units_at_rate(KindSize(7, count, rows=rows), rate, round_to) == removed


def test_layer_rate_removes_the_least_important() -> None:
    sizes = {
        0: {"attention": KindSize(900, 4, rows=8), "mlp": KindSize(10, 10)},
        5: {"mlp": KindSize(10, 20)},
    }
    scores: Values = {
        0: {"attention": [4.0, 1.0, 3.0, 2.0], "mlp": [float(-unit) for unit in range(10)]},
        5: {"mlp": [float(unit) for unit in range(20)]},
    }
    kept = {0: {"attention": (0, 2), "mlp": tuple(range(5))}, 5: {"mlp": tuple(range(10, 20))}}
    assert select_rate(scores, sizes, 0.5) == kept
    half_way = select_rate(scores, sizes, 0.5, progress=0.5)
    assert [len(half_way[0]["attention"]), len(half_way[0]["mlp"]), len(half_way[5]["mlp"])] == [
        3,
        8,
        15,
    ]
