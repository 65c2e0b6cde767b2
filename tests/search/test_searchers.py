"""What is proposed next: never a plan twice, never one over budget, and the same again when a search is taken up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from qpruner.plan import Group, Layout, LinearShape, PlanSpace, PrecisionPlan
from qpruner.search.searchers import Ledger, Observation, Proposer, RandomProposer, Suggestion
from qpruner.search.tune import HyperOptProposer

MakeProposer = Callable[[PlanSpace, int], Proposer]
PROPOSERS = pytest.mark.parametrize("make", [RandomProposer, HyperOptProposer], ids=["random", "hyperopt"])


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


def run(ledger: Ledger) -> list[Suggestion]:
    """One trial after the other until the ledger is done."""
    suggestions = []
    while (suggestion := ledger.next()) is not None:
        suggestions.append(suggestion)
        ledger.observe(suggestion, score_of(suggestion.plan))
    return suggestions


@PROPOSERS
def test_the_controls_run_first(make: MakeProposer) -> None:
    space = space_of(8)
    suggestions = run(ledger_of(space, make))
    assert [(item.origin, item.plan) for item in suggestions[:2]] == controls_of(space)
    assert {item.origin for item in suggestions[2:]} == {make(space, 0).name}


@PROPOSERS
@pytest.mark.parametrize("seed", range(3))
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
    """Asked for 100 trials where 40-odd plans exist, the search ends instead of waiting for ever."""
    space = space_of(6, 0.5)
    ledger = ledger_of(space, make, max_trials=100)
    suggestions = run(ledger)
    assert {item.plan for item in suggestions} == feasible_plans(space)
    assert 10 < len(suggestions) < 64
    assert ledger.next() is None


def test_the_trials_that_were_asked_for_are_given_and_no_more() -> None:
    ledger = ledger_of(space_of(8), RandomProposer, max_trials=5)
    assert len(run(ledger)) == 5
    assert ledger.next() is None


def test_a_control_that_equals_another_runs_once() -> None:
    space = space_of(5)
    plan = space.uniform(4)
    ledger = Ledger(space, RandomProposer(space, 0), [("uniform-4", plan), ("seed-mutual-information", plan)], 4)
    origins = [item.origin for item in run(ledger)]
    assert origins == ["uniform-4", "random", "random", "random"]


@dataclass(frozen=True)
class Neighbour:
    """A searcher that goes on from the last result it is told: the least it takes for the order to matter."""

    space: PlanSpace
    seed: int
    name: str = "neighbour"

    def propose(self, index: int, observations: Sequence[Observation]) -> PrecisionPlan:
        bits = list(observations[-1].plan.bits if observations else self.space.uniform(8).bits)
        bits[index % len(bits)] = 12 - bits[index % len(bits)]
        return PrecisionPlan(self.space.uniform(4).groups, tuple(bits))


@pytest.mark.parametrize("make", [RandomProposer, HyperOptProposer, Neighbour], ids=["random", "hyperopt", "neighbour"])
def test_the_order_in_which_results_arrive_does_not_matter(make: MakeProposer) -> None:
    """On a cluster the same trials end in another order every time."""
    space = space_of(10)
    following = []
    for order in range(4):
        ledger = ledger_of(space, make, max_trials=20)
        running = [ledger.next() for _ in range(9)]
        shuffled = list(running)
        random.Random(order).shuffle(shuffled)
        for suggestion in shuffled:
            assert suggestion is not None
            ledger.observe(suggestion, score_of(suggestion.plan))
        following.append([running, ledger.next(), ledger.next()])
    assert all(other == following[0] for other in following)


@PROPOSERS
def test_a_suggestion_depends_on_seed_position_and_results_only(make: MakeProposer) -> None:
    space = space_of(10)

    def nth(seed: int, trials: Sequence[int]) -> PrecisionPlan:
        """The next proposal when the given of the first plans have ended, asked of a ledger made for it."""
        ledger = ledger_of(space, make, seed, max_trials=30)
        for index in range(10):
            suggestion = ledger.next()
            assert suggestion is not None
            if index in trials:
                ledger.observe(suggestion, score_of(suggestion.plan))
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
    assert len({nth(seed, range(8)) for seed in range(8)}) > 1


def test_a_random_proposal_does_not_look_at_results() -> None:
    space = space_of(10)
    proposer = RandomProposer(space, 4)
    results = [Observation(0, space.uniform(4), 1.0)]
    assert proposer.propose(7, results) == proposer.propose(7, [])
    plans = {proposer.propose(index, []) for index in range(20)}
    assert len(plans) > 15


def test_random_proposals_use_every_level_alike() -> None:
    space = space_of(10, levels=(4, 8, 16))
    proposer = RandomProposer(space, 0)
    bits = [value for index in range(200) for value in proposer.propose(index, []).bits]
    for level in (4, 8, 16):
        assert bits.count(level) / len(bits) == pytest.approx(1 / 3, abs=0.05)


def test_tpe_learns_from_what_ran() -> None:
    """After 30 results that all say "8 bits in the first groups", it proposes that more often than chance does."""
    space = space_of(8, 1.0)
    generator = np.random.default_rng(0)
    names = space.groups
    plans = [PrecisionPlan(names, tuple(int(bits) for bits in generator.choice((4, 8), 8))) for _ in range(30)]
    results = [
        Observation(index, plan, 3.0 - 0.5 * plan.bits[:3].count(8) + 0.5 * plan.bits[5:].count(8))
        for index, plan in enumerate(plans)
    ]
    proposer = HyperOptProposer(space, 0)
    proposals = [proposer.propose(index, results) for index in range(30, 60)]
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
            if index == 4 and ledger is with_failure:
                ledger.observe(suggestion, None)
            elif index != 4:
                ledger.observe(suggestion, score_of(suggestion.plan))
    failed_then, running_then = with_failure.next(), without.next()
    assert failed_then == running_then
    assert len({item.plan for item in run(with_failure)} & {failed_then.plan}) == 0  # type: ignore[union-attr]


@PROPOSERS
@pytest.mark.parametrize("killed_after", [1, 2, 5, 11])
def test_a_search_taken_up_again_is_the_search_that_was_not_interrupted(make: MakeProposer, killed_after: int) -> None:
    space = space_of(9)
    whole = run(ledger_of(space, make))
    ledger = ledger_of(space, make)
    for suggestion in whole[:killed_after]:
        ledger.recall(suggestion, score_of(suggestion.plan))
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
            ledger.observe(suggestion, score_of(suggestion.plan))
    again = ledger_of(space, make)
    for suggestion in before:
        if suggestion.index in (3, 5):
            again.resume(suggestion)
        else:
            again.recall(suggestion, score_of(suggestion.plan))
    assert [again.next(), again.next()] == [before[3], before[5]]
    fresh = again.next()
    assert fresh is not None
    assert fresh == ledger.next()
    assert fresh.index == 7
    assert fresh.plan not in {item.plan for item in before}


def test_controls_that_had_not_run_are_not_forgotten() -> None:
    space = space_of(7)
    controls = controls_of(space)
    ledger = ledger_of(space, RandomProposer)
    ledger.recall(Suggestion(0, *controls[0]), 3.0)
    following = ledger.next()
    assert following is not None
    assert (following.index, following.origin, following.plan) == (1, *controls[1])


def test_recorded_trials_count_towards_the_trials_asked_for() -> None:
    space = space_of(9)
    whole = run(ledger_of(space, RandomProposer))
    ledger = ledger_of(space, RandomProposer)
    for suggestion in whole:
        ledger.recall(suggestion, None)
    assert ledger.next() is None
    longer = ledger_of(space, RandomProposer, max_trials=14)
    for suggestion in whole:
        longer.recall(suggestion, score_of(suggestion.plan))
    assert [item.index for item in run(longer)] == [12, 13]


def test_a_trial_whose_folder_was_deleted_leaves_its_number_free() -> None:
    """To have a failed trial run again people delete its folder; no other trial may get a number that is taken."""
    space = space_of(9)
    whole = run(ledger_of(space, RandomProposer))[:8]
    ledger = ledger_of(space, RandomProposer)
    for suggestion in whole:
        if suggestion.index != 4:
            ledger.recall(suggestion, score_of(suggestion.plan))
    following = run(ledger)
    numbers = [item.index for item in following]
    assert len(following) == 5
    assert len(set(numbers)) == 5
    assert not set(numbers) & {item.index for item in whole if item.index != 4}
