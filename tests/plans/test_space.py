"""The best plans in a budget, which models must not exceed; also with formats of groups' own, and
of several cuts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from made_layouts import LEVELS, any_layout, layout_of, mixed_layout
from made_searches import plans_in

from qpruner.errors import SolverFailed
from qpruner.plans import space as space_module
from qpruner.plans.plan import UNPRUNED, Layout, PrecisionPlan
from qpruner.plans.space import PlanSpace, SearchSpace


def space_of(layout: Layout, share: float) -> PlanSpace:
    """Make the plan space for a budget between the smallest (share 0) and the largest plan (share
    1)."""
    lowest = layout.plan_bytes(layout.smallest())
    highest = layout.plan_bytes(layout.largest())
    return PlanSpace.of(layout, lowest + int(share * (highest - lowest)))


@pytest.mark.parametrize("levels", [LEVELS, ("nf4", "bf16"), ("nf4", "int8", "bf16"), ()], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_the_knapsack_finds_the_best_plan(levels: tuple[str, ...], seed: int) -> None:
    generator = np.random.default_rng(seed)
    space = space_of(any_layout(generator, levels), float(generator.uniform(0.05, 0.95)))
    gains = generator.normal(size=(len(space.groups), len(space.levels)))

    def total(plan: PrecisionPlan) -> float:
        return sum(gains[group][at] for group, at in enumerate(space.indices_of(plan)))

    best = space.best_by_gain(gains.tolist())
    assert space.is_feasible(best)
    totals = [total(plan) for plan in plans_in(space) if space.is_feasible(plan)]
    assert total(best) == pytest.approx(max(totals), abs=1e-9)


@pytest.mark.parametrize("seed", [0, 51])
def test_the_knapsack_is_exact_for_blocks_of_many_widths(seed: int) -> None:
    """Compare with dynamic programming for 56 groups of many sizes (as after a global cut) and
    similar gains.

    With seed 51 a solver that stops at a relative gap of 1e-4 (the default of HiGHS) returns a
    worse plan.
    """
    generator = np.random.default_rng(seed)
    layout = layout_of([(64, int(columns)) for columns in generator.integers(2, 40, 56) * 8])
    space = space_of(layout, 0.47)
    gains = generator.uniform(0.95, 1.05, 56).tolist()
    plan = space.best_by_gain([[0.0, gain] for gain in gains])
    room = space.budget_bytes - layout.plan_bytes(layout.uniform("nf4"))
    best = {0: 0.0}  # bytes more than nf4 takes -> largest gain
    for (low, high), gain in zip(space.group_bytes, gains, strict=True):
        for used, value in sorted(best.items(), reverse=True):
            more = used + high - low
            if more <= room:
                best[more] = max(best.get(more, 0.0), value + gain)
    assert layout.plan_bytes(plan) <= space.budget_bytes
    total = np.dot(gains, np.array(plan.formats) == "int8")
    assert total == pytest.approx(max(best.values()), abs=1e-9)


def test_a_plan_one_byte_over_the_budget_is_rejected() -> None:
    """One byte of gigabytes is far below the solver's tolerance, but still exceeds the budget."""
    layout = layout_of([(4096, 11008)] * 12, rest=2**30)
    highest = layout.uniform("int8")
    space = PlanSpace.of(layout, layout.plan_bytes(highest) - 1)
    for plan in (space.best_by_gain([[0.0, 1.0]] * 12), space.nearest_feasible(highest)):
        assert sorted(str(plan)) == ["4"] + ["8"] * 11


def tight_space(more: int) -> PlanSpace:
    """Make a space of three groups whose plans differ by a billionth of the budget, which is so
    many bytes more than the smallest plan takes."""
    half = 500_000_000
    sizes = ((half, half + 1),) * 3
    return PlanSpace(tuple("abc"), LEVELS, sizes, fixed_bytes=7, budget_bytes=3 * half + more)


def test_a_plan_of_exactly_the_budget_is_found() -> None:
    """All other plans exceed the budget by a billionth, which HiGHS accepts, and with a margin no
    plan is left."""
    space = tight_space(7)
    smallest = space.uniform("nf4")
    assert space.best_by_gain([[0.0, 1.0]] * 3) == smallest
    assert space.nearest_feasible(space.uniform("int8")) == smallest
    assert space.nearest_feasible(space.uniform("int8"), avoid=[smallest]) is None


def test_a_solver_that_finds_only_plans_over_budget_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(space_module, "MAX_EXCLUDED", 1)
    message = r"\(1 of them\): raise `quantize.budget` .*`quantize.group`"
    with pytest.raises(SolverFailed, match=message):
        tight_space(7).best_by_gain([[0.0, 1.0]] * 3)


def test_a_solver_that_gives_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "SOLVER_SECONDS", 0.0)
    space = space_of(layout_of([(64 * (3 + index), 77 + index) for index in range(40)]), 0.5)
    message = r"HiGHS .* status 1 .*limit of 0 s.*`quantize.group`"
    with pytest.raises(SolverFailed, match=message):
        space.best_by_gain([[0.0, 1.0 + index / 7] for index in range(40)])
    with pytest.raises(SolverFailed, match=message):
        space.nearest_feasible(space.uniform("int8"))


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
    layout = any_layout(generator, levels)
    space = space_of(layout, float(generator.uniform(0.2, 0.8)))
    rows = itertools.product(range(len(space.levels)), repeat=len(space.groups))
    plans = [space.plan_of(row) for row in rows]
    feasible = list(filter(space.is_feasible, plans))
    assert set(feasible) == set(filter(space.is_feasible, plans_in(space)))
    for _ in range(5):
        target = plans[generator.integers(len(plans))]
        known = generator.choice(len(feasible), len(feasible) // 2).tolist()
        known_plans = {feasible[index] for index in known}
        repaired = space.nearest_feasible(target, [*known_plans, replace(target, cut=UNPRUNED)])
        candidates = [plan for plan in feasible if plan not in known_plans]
        assert repaired in candidates

        def rank(plan: PrecisionPlan, target: PrecisionPlan = target) -> tuple[int, int]:
            same = np.array(plan.formats) == np.array(target.formats)
            return int(same.sum()), layout.plan_bytes(plan)

        assert rank(repaired) == max(map(rank, candidates))


def test_a_uniform_plan_takes_the_next_larger_format() -> None:
    layout = mixed_layout(np.random.default_rng(0))
    space = space_of(layout, 1.0)
    for name, text in (("nf4", "844444F"), ("int8", "8884F8F"), ("bf16", "F8F4F8F")):
        assert str(layout.uniform(name)) == str(space.uniform(name)) == text
    assert str(layout.smallest()) == str(space.smallest()) == "844444F"
    assert str(layout.largest()) == "F8F4F8F"
    dense = layout.dense()
    assert str(dense) == "FFFFFFF"
    assert dense not in space
    num_weights = sum(group.num_weights for group in layout.groups)
    assert layout.plan_bytes(dense) - 1500 == 2 * num_weights
    assert layout.levels == space.levels == ("nf4", "int8", "bf16")
    assert "nf4" not in layout.sizes[0]
    assert space.group_bytes[0][0] is None


def test_a_plan_of_another_cut_is_outside_the_space() -> None:
    pruned = layout_of([(64, 64)] * 2)
    base = layout_of([(64, 80)] * 2, cut=UNPRUNED)
    space = space_of(pruned, 1.0)
    plan = base.uniform("nf4")
    assert plan.cut == UNPRUNED
    assert space_of(base, 1.0).is_feasible(plan)
    assert plan not in space
    assert not space.is_feasible(plan)
    assert space.uniform("nf4") in space
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
    narrow_shapes = [(64, 80), (80, 96), (60, 64), (77, 48)]
    narrow = layout_of(narrow_shapes, 900, ("nf4", "int8", "bf16"), "cut-10")
    short = layout_of([(64, 96), (64, 64), (77, 64)], 800, levels, "layers-25")
    whole = space_of(base, share)
    kept = ("layers.0", "layers.2", "layers.3")
    return SearchSpace(
        (
            whole,
            PlanSpace.of(narrow, whole.budget_bytes),
            PlanSpace.of(short, whole.budget_bytes, base_groups=kept),
        )
    )


def test_a_plan_of_any_cut_is_a_row_of_indices() -> None:
    """Groups go by their names in the base model; the group that a cut has lost takes nothing."""
    space = cuts_of()
    assert space.cuts == (UNPRUNED, "cut-10", "layers-25")
    assert space.levels == ("nf4", "int8", "bf16")
    assert len(space.groups) == 4
    for at, of_cut in enumerate(space.spaces):
        for plan in plans_in(of_cut):
            row = space.indices_of(plan)
            assert row[-1] == at
            assert space.plan_of(row) == plan
            assert plan in space
            of_groups = space.tables[at, range(4), row[:-1]]
            assert of_groups.sum() + of_cut.fixed_bytes == space.plan_bytes(plan)
    base, narrow, short = space.spaces
    assert space.indices_of(short.uniform("nf4")) == (0, 2, 0, 0, 2)
    dense = narrow.uniform("bf16")
    of_base = space.plan_of((*space.indices_of(dense)[:-1], 0))
    assert of_base == base.uniform("int8"), "what it is offered"
    other = replace(dense, cut="cut-20")
    assert other not in space
    assert not space.is_feasible(other)
    with pytest.raises(ValueError, match="cut-20 is not searched, only base, cut-10, layers-25"):
        space.plan_bytes(other)


def test_a_cut_without_new_plans_hands_on_to_the_next() -> None:
    """Nothing over the budget, nothing twice, and None when every plan of every cut is known."""
    space = cuts_of()
    target = space.spaces[1].uniform("bf16")
    known: list[PrecisionPlan] = []
    while plan := space.nearest_feasible(target, known):
        known.append(plan)
    base, narrow, short = (list(filter(cut.is_feasible, plans_in(cut))) for cut in space.spaces)
    assert len(known) == len(set(known))
    assert set(known) == {*base, *narrow, *short}
    cuts = [plan.cut for plan in (*narrow, *short, *base)]
    assert [plan.cut for plan in known] == cuts
