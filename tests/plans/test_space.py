"""The best plans in a budget, which models must not exceed; also with formats of groups' own, and
of several cuts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from made_layouts import LEVELS, layout_of, mixed_layout, random_layout
from made_searches import plans_in

from qpruner.errors import SolverFailed
from qpruner.plans import space as space_module
from qpruner.plans.plan import UNPRUNED, Layout, PrecisionPlan
from qpruner.plans.space import PlanSpace, SearchSpace


def space_of(layout: Layout, share: float) -> PlanSpace:
    """Make the plan space for a budget between the smallest (share 0) and the largest plan (share
    1)."""
    lowest, highest = layout.plan_bytes(layout.smallest()), layout.plan_bytes(layout.largest())
    return PlanSpace.of(layout, lowest + int(share * (highest - lowest)))


@pytest.mark.parametrize("levels", [LEVELS, ("nf4", "bf16"), ("nf4", "int8", "bf16"), ()], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_the_knapsack_finds_the_best_plan(levels: tuple[str, ...], seed: int) -> None:
    generator = np.random.default_rng(seed)
    layout = (
        random_layout(generator, 7 if len(levels) == 2 else 5, levels)
        if levels
        else mixed_layout(generator)
    )
    space = space_of(layout, float(generator.uniform(0.05, 0.95)))
    gains = generator.normal(size=(len(layout.groups), len(space.levels)))

    def total(plan: PrecisionPlan) -> float:
        return sum(gains[group][at] for group, at in enumerate(space.indices_of(plan)))

    found = space.best_by_gain(gains.tolist())
    assert layout.plan_bytes(found) <= space.budget_bytes
    assert total(found) == pytest.approx(
        max(map(total, filter(space.is_feasible, plans_in(space)))), abs=1e-9
    )


@pytest.mark.parametrize("seed", [0, 51])
def test_the_knapsack_is_exact_for_blocks_of_many_widths(seed: int) -> None:
    """Compare with dynamic programming for 56 groups of many sizes (as after a global cut) and
    similar gains.

    With seed 51 a solver that stops at a relative gap of 1e-4 (the default of HiGHS) returns a
    worse plan.
    """
    generator = np.random.default_rng(seed)
    layout = layout_of([(64, int(columns)) for columns in generator.integers(2, 40, 56) * 8])
    space, gains = space_of(layout, 0.47), generator.uniform(0.95, 1.05, 56)
    found = space.best_by_gain([[0.0, float(gain)] for gain in gains])
    room, best = space.budget_bytes - layout.plan_bytes(layout.uniform("nf4")), {0: 0.0}
    for (low, high), gain in zip(space.group_bytes, gains, strict=True):
        for used, value in sorted(best.items(), reverse=True):
            weight = used + high - low
            if weight <= room and value + gain > best.get(weight, -np.inf):
                best[weight] = value + float(gain)
    assert layout.plan_bytes(found) <= space.budget_bytes
    total = sum(gain for gain, bits in zip(gains, found.formats, strict=True) if bits == "int8")
    assert total == pytest.approx(max(best.values()), abs=1e-9)


def test_a_plan_one_byte_over_the_budget_is_rejected() -> None:
    """One byte of gigabytes is far below the solver's tolerance, but still exceeds the budget."""
    layout = layout_of([(4096, 11008)] * 12, rest=2**30)
    highest = layout.uniform("int8")
    space = PlanSpace.of(layout, layout.plan_bytes(highest) - 1)
    for found in (space.best_by_gain([[0.0, 1.0]] * 12), space.nearest_feasible(highest)):
        assert found is not None and sorted(str(found)) == ["4"] + ["8"] * 11


def test_a_plan_of_exactly_the_budget_is_found() -> None:
    """All other plans exceed the budget by a billionth, which HiGHS accepts, and with a margin no
    plan is left."""
    half = 500_000_000
    groups = tuple(f"layers.{index}" for index in range(3))
    space = PlanSpace(
        groups, ("nf4", "int8"), ((half, half + 1),) * 3, fixed_bytes=7, budget_bytes=3 * half + 7
    )
    assert space.best_by_gain([[0.0, 1.0]] * 3) == space.uniform("nf4")
    assert space.nearest_feasible(space.uniform("int8")) == space.uniform("nf4")
    assert space.nearest_feasible(space.uniform("int8"), avoid=[space.uniform("nf4")]) is None


def test_a_solver_that_finds_only_plans_over_budget_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(space_module, "MAX_EXCLUDED", 1)
    sizes = ((500_000_000, 500_000_001),) * 3
    space = PlanSpace(
        tuple("abc"), ("nf4", "int8"), sizes, fixed_bytes=0, budget_bytes=1_500_000_000
    )
    with pytest.raises(
        SolverFailed, match=r"budget .*\(1 of them\): raise `quantize.budget` .*`quantize.group`"
    ):
        space.best_by_gain([[0.0, 1.0]] * 3)


def test_a_solver_that_gives_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "SOLVER_SECONDS", 0.0)
    layout = layout_of([(64 * (3 + index), 77 + index) for index in range(40)])
    space = space_of(layout, 0.5)
    gains = [[0.0, 1.0 + index / 7] for index in range(40)]
    for ask in (
        lambda: space.best_by_gain(gains),
        lambda: space.nearest_feasible(layout.uniform("int8")),
    ):
        with pytest.raises(
            SolverFailed, match=r"HiGHS .* ended with status 1 .*limit of 0 s.*`quantize.group`"
        ):
            ask()


def test_no_plan_below_the_lowest_levels() -> None:
    layout = layout_of([(64, 64), (77, 64)])
    space = PlanSpace.of(layout, layout.plan_bytes(layout.uniform("nf4")) - 1)
    with pytest.raises(ValueError, match="no plan fits"):
        space.best_by_gain([[0.0, 1.0]] * 2)
    assert space.nearest_feasible(layout.uniform("int8")) is None


@pytest.mark.parametrize("levels", [LEVELS, ("nf4", "int8", "bf16"), ()], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_repaired_plan_differs_in_the_fewest_groups(levels: tuple[str, ...], seed: int) -> None:
    generator = np.random.default_rng(seed)
    layout = random_layout(generator, 5, levels) if levels else mixed_layout(generator)
    space = space_of(layout, float(generator.uniform(0.2, 0.8)))
    plans = [
        space.plan_of(each)
        for each in itertools.product(range(len(space.levels)), repeat=len(space.groups))
    ]
    feasible = list(filter(space.is_feasible, plans))
    assert set(feasible) == set(filter(space.is_feasible, plans_in(space)))

    def agreement(plan: PrecisionPlan) -> int:
        return sum(bits == other for bits, other in zip(plan.formats, wanted.formats, strict=True))

    for _ in range(5):
        wanted = plans[generator.integers(len(plans))]
        known = {
            feasible[index] for index in generator.integers(len(feasible), size=len(feasible) // 2)
        }
        found = space.nearest_feasible(wanted, avoid=[*known, replace(wanted, cut=UNPRUNED)])
        candidates = [plan for plan in feasible if plan not in known]
        assert found is not None and found in candidates
        best = max(candidates, key=lambda plan: (agreement(plan), layout.plan_bytes(plan)))
        assert (agreement(found), layout.plan_bytes(found)) == (
            agreement(best),
            layout.plan_bytes(best),
        )


def test_a_uniform_plan_takes_the_next_larger_format() -> None:
    layout = mixed_layout(np.random.default_rng(0))
    space = space_of(layout, 1.0)
    for name, text in (("nf4", "844444F"), ("int8", "8884F8F"), ("bf16", "F8F4F8F")):
        assert str(layout.uniform(name)) == str(space.uniform(name)) == text
    assert str(layout.smallest()) == str(space.smallest()) == "844444F"
    assert str(layout.largest()) == "F8F4F8F"
    assert str(layout.dense()) == "FFFFFFF" and layout.dense() not in space
    assert layout.plan_bytes(layout.dense()) - 1500 == 2 * sum(
        group.num_weights for group in layout.groups
    )
    assert layout.levels == space.levels == ("nf4", "int8", "bf16")
    assert "nf4" not in layout.sizes[0] and space.group_bytes[0][0] is None


def test_a_plan_of_another_cut_is_outside_the_space() -> None:
    pruned, base = layout_of([(64, 64)] * 2), layout_of([(64, 80)] * 2, cut=UNPRUNED)
    space, plan = space_of(pruned, 1.0), base.uniform("nf4")
    assert plan.cut == UNPRUNED and space_of(base, 1.0).is_feasible(plan)
    assert plan not in space and not space.is_feasible(plan) and space.uniform("nf4") in space
    with pytest.raises(ValueError, match="of the cut base is not in the space of the cut cut-20"):
        space.plan_bytes(plan)


def test_the_solver_prints_nothing_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints from C code, perhaps after the JSON object that `--json` must print last."""
    import ctypes

    library = ctypes.CDLL(None)
    with space_module._native_output_dropped():
        library.puts(b"a line of native code")
    print("ours")
    library.fflush(None)
    assert capfd.readouterr().out == "ours\n"


# ---- several cuts


def cuts_of(share: float = 0.4, levels: tuple[str, ...] = LEVELS) -> SearchSpace:
    """A base model of four blocks, a cut of narrower blocks, and one without the second block."""
    base = layout_of([(64, 96), (96, 96), (64, 64), (77, 64)], levels=levels, cut=UNPRUNED)
    narrow = layout_of(
        [(64, 80), (80, 96), (60, 64), (77, 48)], 900, ("nf4", "int8", "bf16"), "cut-10"
    )
    short = layout_of([(64, 96), (64, 64), (77, 64)], 800, levels, "layers-25")
    lowest, highest = base.plan_bytes(base.smallest()), base.plan_bytes(base.largest())
    budget, kept = (
        lowest + int(share * (highest - lowest)),
        tuple(f"layers.{at}" for at in (0, 2, 3)),
    )
    spaces = [
        PlanSpace.of(base, budget),
        PlanSpace.of(narrow, budget),
        PlanSpace.of(short, budget, base_groups=kept),
    ]
    return SearchSpace(tuple(spaces))


def test_a_plan_of_any_cut_is_a_row_of_indices() -> None:
    """Groups go by their names in the base model; the group that a cut has lost takes nothing."""
    space = cuts_of()
    assert space.cuts == (UNPRUNED, "cut-10", "layers-25")
    assert space.levels == ("nf4", "int8", "bf16") and len(space.groups) == 4
    for at, each in enumerate(space.spaces):
        for plan in plans_in(each):
            row = space.indices_of(plan)
            assert space.plan_of(row) == plan and row[-1] == at and plan in space
            of_groups = space.tables[at, range(4), row[:-1]]
            assert of_groups.sum() + each.fixed_bytes == space.plan_bytes(plan)
    assert space.indices_of(space.spaces[2].uniform("nf4")) == (0, 2, 0, 0, 2)
    dense = space.spaces[1].uniform("bf16")
    assert space.plan_of((*space.indices_of(dense)[:-1], 0)) == space.spaces[0].uniform("int8"), (
        "what it is offered"
    )
    other = replace(dense, cut="cut-20")
    assert other not in space and not space.is_feasible(other)
    with pytest.raises(
        ValueError, match="the cut cut-20 is not searched, only base, cut-10, layers-25"
    ):
        space.plan_bytes(other)


def test_a_cut_without_new_plans_hands_on_to_the_next() -> None:
    """Nothing over the budget, nothing twice, and None when every plan of every cut is known."""
    space, known = cuts_of(), list[PrecisionPlan]()
    wanted = space.spaces[1].uniform("bf16")
    while (found := space.nearest_feasible(wanted, known)) is not None:
        known.append(found)
    every = [list(filter(each.is_feasible, plans_in(each))) for each in space.spaces]
    assert len(known) == len(set(known)) and set(known) == {
        plan for plans in every for plan in plans
    }
    order = [len(every[1]), len(every[2]), len(every[0])]
    assert [plan.cut for plan in known] == ["cut-10"] * order[0] + ["layers-25"] * order[1] + [
        UNPRUNED
    ] * order[2]
