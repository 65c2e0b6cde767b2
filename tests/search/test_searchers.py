"""What is proposed next: never a plan twice, never one over budget, and the same again when a search is taken up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from qpruner.cluster.tune import make_proposer
from qpruner.errors import UserError
from qpruner.plans.plan import Group, Layout, LinearShape, PlanSpace, PrecisionPlan
from qpruner.search import searchers
from qpruner.search.searchers import (
    History,
    Ledger,
    Observation,
    Proposal,
    Proposer,
    RandomProposer,
    ScalarizedProposer,
    Suggestion,
    check_searcher,
)

MakeProposer = Callable[[PlanSpace, int], Proposer]
NAMES = ("random", "hyperopt", "gp")
"""bayesopt takes a third of a second a proposal, so it has a few tests of its own."""
STEPS = (4, 8)


def maker(name: str) -> MakeProposer:
    return lambda space, seed: make_proposer(name, space, seed, {})


PROPOSERS = pytest.mark.parametrize("make", [maker(name) for name in NAMES], ids=NAMES)


def space_of(num_groups: int, share: float = 0.5, levels: tuple[int, ...] = (4, 8)) -> PlanSpace:
    sizes = np.random.default_rng(num_groups).integers(1, 5, num_groups) * 64
    groups = tuple(
        Group(f"layers.{index}", (LinearShape(f"model.layers.{index}", 64, int(size)),))
        for index, size in enumerate(sizes)
    )
    layout = Layout(groups, 5000, 300, 2, double_quant=False, num_parameters=10**6)
    lowest, highest = layout.plan_bytes(layout.uniform(levels[0])), layout.plan_bytes(layout.uniform(levels[-1]))
    return PlanSpace.of(layout, levels, lowest + int(share * (highest - lowest)))


def feasible_plans(space: PlanSpace) -> set[PrecisionPlan]:
    names = space.groups
    plans = (PrecisionPlan(names, bits) for bits in itertools.product(space.levels, repeat=len(names)))
    return {plan for plan in plans if space.plan_bytes(plan) <= space.budget_bytes}


def controls_of(space: PlanSpace) -> list[tuple[str, PrecisionPlan]]:
    gains = [[0.0, float(index)] + [float(index)] * (len(space.levels) - 2) for index in range(len(space.groups))]
    return [("uniform-4", space.uniform(4)), ("seed-mutual-information", space.best_by_gain(gains))]


def ledger_of(space: PlanSpace, make: MakeProposer, seed: int = 0, max_trials: int = 12) -> Ledger:
    return Ledger(space, make(space, seed), controls_of(space), max_trials)


def score_of(plan: PrecisionPlan) -> float:
    """A loss that wants bits in the early groups."""
    return 3.0 - sum((bits == 8) / (1 + index) for index, bits in enumerate(plan.bits))


def rungs_of(suggestion: Suggestion) -> list[Observation]:
    """What a trial that runs to its end reports."""
    score = score_of(suggestion.plan)
    return [Observation(suggestion.index, suggestion.plan, step, score + 1 / step) for step in STEPS]


def test_an_untrainable_plan_scores_worse_than_all_others() -> None:
    """At the last step that any plan reached; an unknown plan would be a hole that the searcher knows nothing of."""
    ledger = ledger_of(space_of(4), maker("random"))
    ruined, good, bad = (ledger.next() for _ in range(3))
    assert ruined and good and bad
    ledger.close(ruined, "untrainable")
    assert ledger.history().observations == () and ledger.history().failed == (ruined.plan,), "nothing is known yet"
    ledger.observe(Observation(good.index, good.plan, 4, 3.0))
    told = [(item.index, item.step, item.score) for item in ledger.history().observations]
    assert told == [(ruined.index, 4, pytest.approx(3.03)), (good.index, 4, 3.0)]
    ledger.observe(Observation(good.index, good.plan, 8, 2.9))
    ledger.observe(Observation(bad.index, bad.plan, 8, 3.4))
    assert Observation(ruined.index, ruined.plan, 8, pytest.approx(3.9)) in ledger.history().observations
    assert ledger.history().failed == ()


def finish(ledger: Ledger, suggestion: Suggestion) -> None:
    for rung in rungs_of(suggestion):
        ledger.observe(rung)
    ledger.close(suggestion)


def run(ledger: Ledger) -> list[Suggestion]:
    """One trial after the other until the ledger is done."""
    suggestions = []
    while (suggestion := ledger.next()) is not None:
        suggestions.append(suggestion)
        finish(ledger, suggestion)
    return suggestions


@PROPOSERS
def test_the_controls_run_first(make: MakeProposer) -> None:
    space = space_of(8)
    suggestions = run(ledger_of(space, make))
    assert [(item.origin, item.plan) for item in suggestions[:2]] == controls_of(space)
    assert {item.origin for item in suggestions[2:]} == {make(space, 0).name}


@PROPOSERS
@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize("levels", [(4, 8), (4, 8, 16)], ids=str)
def test_no_plan_twice_and_none_over_budget(make: MakeProposer, seed: int, levels: tuple[int, ...]) -> None:
    space = space_of(8, 0.4, levels)
    suggestions = run(ledger_of(space, make, seed))
    plans = [item.plan for item in suggestions]
    assert len(plans) == 12
    assert len(set(plans)) == 12
    assert all(space.plan_bytes(plan) <= space.budget_bytes for plan in plans)
    assert [item.index for item in suggestions] == list(range(12))


@PROPOSERS
def test_a_small_space_is_tried_out_and_then_it_is_over(make: MakeProposer) -> None:
    """Asked for 100 trials where 20-odd plans exist, the search ends instead of waiting for ever."""
    space = space_of(5, 0.5)
    ledger = ledger_of(space, make, max_trials=100)
    suggestions = run(ledger)
    assert {item.plan for item in suggestions} == feasible_plans(space)
    assert 10 < len(suggestions) < 32
    assert ledger.next() is None


@PROPOSERS
def test_the_order_in_which_results_arrive_does_not_matter(make: MakeProposer) -> None:
    """On a cluster the same trials end in another order every time."""
    space = space_of(10)
    following = []
    for order in range(3):
        ledger = ledger_of(space, make, max_trials=20)
        running = [ledger.next() for _ in range(9)]
        shuffled = list(running)
        random.Random(order).shuffle(shuffled)
        for suggestion in shuffled:
            assert suggestion is not None
            finish(ledger, suggestion)
        following.append([running, ledger.next(), ledger.next()])
    assert all(other == following[0] for other in following)


@PROPOSERS
def test_a_suggestion_depends_on_seed_position_and_results_only(make: MakeProposer) -> None:
    space = space_of(10)

    def nth(seed: int, trials: Sequence[int]) -> PrecisionPlan:
        """The next proposal when the given of the first plans have ended, asked of a ledger made for it."""
        ledger = Ledger(space, make(space, seed), [], max_trials=30)
        for index in range(10):
            suggestion = ledger.next()
            assert suggestion is not None
            if index in trials:
                finish(ledger, suggestion)
        found = ledger.next()
        assert found is not None
        return found.plan

    # The global states differ, as they do in another process.
    random.seed(1)
    np.random.seed(1)
    first = nth(3, range(8))
    random.seed(2)
    np.random.seed(2)
    assert nth(3, range(8)) == first
    assert len({nth(seed, range(8)) for seed in range(4)}) > 1


@pytest.mark.parametrize("name", ["hyperopt", "bayesopt", "gp"])
def test_a_searcher_learns_from_what_ran(name: str) -> None:
    """After 30 results that all say "8 bits in the first groups", it proposes that more often than chance does."""
    space = space_of(8, 1.0)
    generator = np.random.default_rng(0)
    names = space.groups
    plans = [PrecisionPlan(names, tuple(int(bits) for bits in generator.choice((4, 8), 8))) for _ in range(30)]
    results = [
        Observation(index, plan, 8, 3.0 - 0.5 * plan.bits[:3].count(8) + 0.5 * plan.bits[5:].count(8))
        for index, plan in enumerate(plans)
    ]
    proposer = make_proposer(name, space, 0, {})
    history, number = History(tuple(results)), 5 if name == "bayesopt" else 20
    proposals = [proposer.propose(index, history).plan for index in range(30, 30 + number)]
    first = np.mean([plan.bits[group] == 8 for plan in proposals for group in range(3)])
    last = np.mean([plan.bits[group] == 8 for plan in proposals for group in range(5, 8)])
    assert first > 0.65
    assert last < 0.35


@PROPOSERS
def test_a_failed_trial_is_not_learned_from_and_not_repeated(make: MakeProposer) -> None:
    space = space_of(8)
    with_failure, without = ledger_of(space, make), ledger_of(space, make)
    for ledger in (with_failure, without):
        for index in range(6):
            suggestion = ledger.next()
            assert suggestion is not None
            if index == 4:
                failed = suggestion
                if ledger is with_failure:
                    ledger.close(suggestion)
            else:
                finish(ledger, suggestion)
    assert with_failure.history().failed == (failed.plan,)
    assert without.history().pending == (failed.plan,)
    if make(space, 0).name != "gp":  # gp expects something of what is still running
        assert with_failure.next() == without.next()
    assert failed.plan not in {item.plan for item in run(with_failure)}


@pytest.mark.parametrize(("name", "max_trials"), [*((name, 12) for name in NAMES), ("bayesopt", 10)])
def test_a_resumed_search_proposes_the_same_plans(name: str, max_trials: int) -> None:
    space, killed_after = space_of(9), 5
    whole = run(ledger_of(space, maker(name), max_trials=max_trials))
    ledger = ledger_of(space, maker(name), max_trials=max_trials)
    for suggestion in whole[:killed_after]:
        ledger.recall(suggestion, rungs_of(suggestion))
    assert run(ledger) == whole[killed_after:]


@PROPOSERS
def test_what_was_running_goes_on_first(make: MakeProposer) -> None:
    """Killed with trials 3 and 5 under way: those two are handed out again, as they were, before anything new."""
    space = space_of(9)
    ledger = ledger_of(space, make)
    before = []
    for index in range(7):
        suggestion = ledger.next()
        assert suggestion is not None
        before.append(suggestion)
        if index not in (3, 5):
            finish(ledger, suggestion)
        elif index == 5:
            ledger.observe(rungs_of(suggestion)[0])
    again = ledger_of(space, make)
    for suggestion in before:
        if suggestion.index in (3, 5):
            again.resume(suggestion, rungs_of(suggestion)[:1] if suggestion.index == 5 else ())
        else:
            again.recall(suggestion, rungs_of(suggestion))
    assert [again.next(), again.next()] == [before[3], before[5]]
    fresh = again.next()
    assert fresh is not None
    assert fresh == ledger.next()
    assert fresh.index == 7
    assert fresh.plan not in {item.plan for item in before}


@dataclass(frozen=True)
class Hopeless:
    """A searcher that sees nothing to win from its third proposal on."""

    space: PlanSpace
    name: str = "hopeless"

    def propose(self, index: int, history: History) -> Proposal:
        plan = RandomProposer(self.space, 0).propose(index, history).plan
        return Proposal(plan, expected_improvement=0.1 if index < 3 else 0.001, noise=0.01)


def test_patience_ends_a_search_and_says_so() -> None:
    space = space_of(8)
    ledger = Ledger(space, Hopeless(space), [], max_trials=50, patience=3)
    assert len(run(ledger)) == 3 + 2
    assert ledger.ended is not None
    assert "0.001" in ledger.ended
    assert "search.patience" in ledger.ended
    assert len(run(Ledger(space, Hopeless(space), [], max_trials=20))) == 20


def test_a_scalarized_searcher_weighs_bytes_and_scores() -> None:
    """Of two plans with equal scores the smaller one is the better."""
    told = []

    @dataclass(frozen=True)
    class Listener:
        name: str = "listener"

        def propose(self, index: int, history: History) -> Proposal:
            told.append([item.score for item in history.observations])
            return Proposal(space.uniform(4))

    space = space_of(6, 1.0)
    observations = tuple(Observation(at, space.uniform(bits), 8, 2.0) for at, bits in enumerate((4, 8)))
    proposer = ScalarizedProposer(Listener(), space, 0)
    for index in range(5):
        proposer.propose(index, History(observations))
    assert all(small < large for small, large in told)
    assert len({large for _, large in told}) == 5


@pytest.mark.parametrize("version", [None, "2.0.3"])
def test_a_searcher_whose_package_is_missing_names_the_command(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(searchers.importlib.metadata, "version", found)
    for name in ("gp", "hyperopt", "random"):
        check_searcher(name)
    with pytest.raises(UserError, match=r'pip install "qpruner\[bayesopt\]"'):
        make_proposer("bayesopt", space_of(4), 0, {})
