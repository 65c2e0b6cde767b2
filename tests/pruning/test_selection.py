"""Selection of units: the rate is met, and no block loses its last head."""

from typing import Any

import numpy as np
import pytest

from qpruner.errors import UserError
from qpruner.pruning.allocation import counts_per_layer
from qpruner.pruning.selection import select, select_rate, units_at_rate
from qpruner.pruning.units import Kept, KindSize, Sizes, available

Values = dict[int, dict[str, Any]]
"""Of each block the scores of its units, by kind."""
SELECTIONS = ["per_layer", "global"]


def sizes_of(num_layers: int, **kinds: KindSize) -> Sizes:
    """Make equal blocks, numbered from 3 as with `first_layer: 3`."""
    return {index: dict(kinds) for index in range(3, 3 + num_layers)}


def random_scores(
    generator: np.random.Generator, sizes: Sizes, weight_of_heads: float = 1.0
) -> Values:
    """Draw gamma-distributed scores; heads score `weight_of_heads` times as much per parameter as
    channels."""
    scores: Values = {}
    for index, kinds in sizes.items():
        scores[index] = {kind: generator.gamma(2.0, 1.0, kinds[kind].count) for kind in kinds}
        per_channel = kinds["attention"].parameters / kinds["mlp"].parameters
        scores[index]["attention"] *= weight_of_heads * per_channel
    return scores


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
    widths = {len(kinds["mlp"]) for kinds in kept.values()} - {channels}
    assert widths
    assert all(width > 0 and width % round_to == 0 for width in widths)


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
    counts = counts_per_layer(sizes, target)
    for kind, size in {"attention": attention, "mlp": mlp}.items():
        for kinds in kept.values():
            assert kinds[kind]
            assert list(kinds[kind]) == sorted(set(kinds[kind]) & set(range(size.count)))
        numbers = [kinds[kind] for kinds in counts.values()]
        assert max(numbers) - min(numbers) <= 1
    assert abs(target - removed_by(kept, sizes)) <= mlp.parameters


# ---- which


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_the_least_important_go_first(seed: int, selection: str) -> None:
    """With `global` the first block, which matters least, loses more than the last."""
    generator = np.random.default_rng(seed)
    sizes = sizes_of(4, attention=KindSize(2000, 4), mlp=KindSize(60, 200))
    scores = random_scores(generator, sizes, weight_of_heads=0.1)
    for values in scores[3].values():
        values /= 20
    kept = select(scores, sizes, int(0.3 * available(sizes)), selection)
    for kind in ("attention", "mlp"):
        gone = []
        stays = []
        for index, kinds in scores.items():
            units = list(kept[index][kind])
            gone.append(np.delete(kinds[kind], units).max(initial=0.0))
            stays.append(kinds[kind][units])
        if selection == "per_layer":
            assert all(most <= values.min() for most, values in zip(gone, stays, strict=True))
        else:  # only the last unit of a block may be less important than units removed elsewhere
            assert max(gone) <= min(values.min() for values in stays if len(values) > 1)
    assert (len(kept[3]["mlp"]) < len(kept[6]["mlp"])) == (selection == "global")


@pytest.mark.parametrize(
    ("heads", "channels", "target", "heads_kept", "channels_kept"),
    [
        # A unit a hundred times as large must score a hundred times as much to stay.
        ([900.0, 5.0], [1.0] * 300, 1000, (0,), range(300)),
        ([900.0, 500.0], [1.0] * 300, 1000, (0, 1), range(100, 300)),
        # Channels alone fall short, so a head is removed, and the most important channels come
        # back.
        ([1e9, 1e8], [float(unit) for unit in range(100)], 1200, (0,), range(20, 100)),
    ],
)
def test_heads_and_channels_compete_by_parameter(
    heads: list[float],
    channels: list[float],
    target: int,
    heads_kept: tuple[int, ...],
    channels_kept: range,
) -> None:
    sizes = {0: {"attention": KindSize(1000, 2), "mlp": KindSize(10, len(channels))}}
    kept = select({0: {"attention": heads, "mlp": channels}}, sizes, target, "global")
    assert kept == {0: {"attention": heads_kept, "mlp": tuple(channels_kept)}}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("seed", range(20))
def test_no_unit_returns_after_a_step_beyond_its_target(seed: int, selection: str) -> None:
    """A head has more parameters than several steps, so the steps after it remove nothing."""
    generator = np.random.default_rng(seed)
    head = int(generator.integers(50, 400))
    sizes = sizes_of(2, attention=KindSize(head, 4), mlp=KindSize(10, 12))
    target = int(available(sizes) * generator.uniform(0.1, 0.6))
    steps = int(generator.integers(3, 9))
    alive = {index: {"attention": range(4), "mlp": range(12)} for index in sizes}
    for step in range(1, steps + 1):
        scores: Values = {}
        for index, kinds in sizes.items():
            scores[index] = {kind: np.full(kinds[kind].count, -np.inf) for kind in kinds}
            for kind, units in alive[index].items():
                scores[index][kind][list(units)] = generator.random(len(units))
        kept = select(scores, sizes, target, selection, progress=step / steps)
        for index, kinds in kept.items():
            assert all(set(kinds[kind]) <= set(alive[index][kind]) for kind in kinds)
        alive = kept
    assert abs(removed_by(alive, sizes) - target) <= head


# ---- uniform widths


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("attention",)], ids=str)
@pytest.mark.parametrize("seed", range(7))
def test_no_uniform_widths_are_nearer(seed: int, kinds: tuple[str, ...]) -> None:
    """Compared with every combination; within half a unit per block, a more even one may win."""
    generator = np.random.default_rng(seed)
    plain = sorted({*generator.integers(1, 12, 4).tolist(), 12})
    head = int(generator.integers(1000, 30000))
    channel = int(generator.integers(5, 100))
    every = {"attention": KindSize(head, 12, plain=tuple(plain)), "mlp": KindSize(channel, 640)}
    removed_heads = [5 * head * (12 - count) for count in plain]
    removed_channels = range(0, 5 * channel * 640, 5 * channel * 64) if "mlp" in kinds else [0]

    possible = [heads + channels for heads in removed_heads for channels in removed_channels]
    target = int(max(possible) * generator.uniform(0.05, 0.95))
    sizes = sizes_of(5, **{kind: every[kind] for kind in kinds})
    counts = counts_per_layer(sizes, target, 64, uniform=True)
    first, *others = counts.values()
    assert others == [first] * 4
    smallest = min(head, 64 * channel) if "mlp" in kinds else head
    nearest = min(abs(parameters - target) for parameters in possible)
    assert abs(parameters_of(counts, sizes) - target) <= max(5 * smallest / 2, nearest)


SMOLLM2 = (
    *(30, 134_515_008),
    *(KindSize(64 * 576 * 8, 3, plain=(1, 2, 3)), KindSize(3 * 576, 1536)),
)
LLAMA_2_7B = (
    *(32, 6_738_415_616),
    *(KindSize(4 * 128 * 4096, 32, plain=(1, 2, 4, 8, 16, 32)), KindSize(3 * 4096, 11008)),
)
"""Number of blocks, parameters, a head of each block, a channel of each block."""


@pytest.mark.parametrize("rate", np.arange(0.02, 0.5, 0.02))
@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_2_7B], ids=["SmolLM2-135M", "Llama-2-7B"])
def test_uniform_heads_lose_at_most_the_share(shape: Any, rate: float) -> None:
    """Without this rule half of all heads were removed to come 0.1 % closer to the rate."""
    num_blocks, parameters, attention, mlp = shape
    sizes = sizes_of(num_blocks, attention=attention, mlp=mlp)
    target = int(rate * parameters)
    gone = counts_per_layer(sizes, target, 64, uniform=True)[3]["attention"]
    fewest = attention.count * (1 - target / available(sizes))
    assert attention.count - gone == min(count for count in attention.plain if count >= fewest)


def test_too_few_plain_heads_are_refused() -> None:
    """A smaller cut without an error would be taken for the requested cut."""
    sizes = sizes_of(2, attention=KindSize(1000, 8, plain=(4, 8)), mlp=KindSize(10, 100))
    with pytest.raises(UserError, match=r"at most 9,980, .*`uniform: false`"):
        counts_per_layer(sizes, 2 * 7000, uniform=True)


@pytest.mark.parametrize(
    ("uniform", "step", "tolerance"), [(True, 9000, 4500), (False, 3000, 1500 + 180 * 20)]
)
@pytest.mark.parametrize("target", range(0, 20000, 2300))
def test_nearest_heads_where_channels_cannot_shrink(
    target: int, uniform: bool, step: int, tolerance: int
) -> None:
    """With `round_to` as wide as the MLP, only heads of 3000 parameters can be removed, if uniform
    in all blocks."""
    sizes = sizes_of(3, attention=KindSize(3000, 3), mlp=KindSize(180, 40))
    removed = parameters_of(counts_per_layer(sizes, target, round_to=40, uniform=uniform), sizes)
    assert removed % step == 0
    assert abs(removed - target) <= tolerance


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
    narrow = {"attention": KindSize(900, 4, rows=8), "mlp": KindSize(10, 10)}
    sizes = {0: narrow, 5: {"mlp": KindSize(10, 20)}}
    first = {"attention": [4.0, 1.0, 3.0, 2.0], "mlp": list(range(0, -10, -1))}
    scores = {0: first, 5: {"mlp": list(range(20))}}
    kept = {0: {"attention": (0, 2), "mlp": tuple(range(5))}, 5: {"mlp": tuple(range(10, 20))}}
    assert select_rate(scores, sizes, 0.5) == kept
    half_way = select_rate(scores, sizes, 0.5, progress=0.5)
    counts = [len(units) for kinds in half_way.values() for units in kinds.values()]
    assert counts == [3, 8, 15]
