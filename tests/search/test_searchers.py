"""Proposals: no plan twice, none over budget, and the same ones when a search is resumed."""

import random
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from made_searches import blocks, masked_space, plans_in, space_of

from qpruner.cluster.tune import make_proposer
from qpruner.errors import UserError
from qpruner.plans.plan import PrecisionPlan
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.search import searchers
from qpruner.search.searchers import (
    History,
    Ledger,
    Observation,
    Proposer,
    RandomProposer,
    Suggestion,
    check_searcher,
)

MakeProposer = Callable[[PlanSpace, int], Proposer]
NAMES = ("random", "hyperopt", "gp")
"""bayesopt is in few tests: each of its proposals takes a third of a second."""
STEPS = (4, 8)


def maker(name: str) -> MakeProposer:
    return lambda space, seed: make_proposer(name, SearchSpace((space,)), seed, {})


PROPOSERS = pytest.mark.parametrize("make", [maker(name) for name in NAMES], ids=NAMES)


def controls_of(space: PlanSpace) -> list[tuple[str, PrecisionPlan]]:
    gains = [
        [0.0, float(index)] + [float(index)] * (len(space.levels) - 2)
        for index in range(len(space.groups))
    ]
    return [
        ("unpruned-uniform", space.uniform("nf4")),
        ("seed-mutual-information", space.best_by_gain(gains)),
    ]


def ledger_of(space: PlanSpace, make: MakeProposer, seed: int = 0, max_trials: int = 12) -> Ledger:
    return Ledger(SearchSpace((space,)), make(space, seed), controls_of(space), max_trials)


def rungs_of(suggestion: Suggestion) -> list[Observation]:
    """The rungs of a finished trial; its loss is lower with more bits in the first groups."""
    score = 3.0 - sum(
        (name == "int8") / (1 + index) for index, name in enumerate(suggestion.plan.formats)
    )
    return [
        Observation(suggestion.index, suggestion.plan, step, score + 1 / step) for step in STEPS
    ]


def finish(ledger: Ledger, suggestion: Suggestion) -> None:
    for rung in rungs_of(suggestion):
        ledger.observe(rung)
    ledger.close(suggestion)


def begin(ledger: Ledger, number: int, finished: Collection[int] = ()) -> list[Suggestion]:
    """Begin some trials; those in `finished` end before the next one begins."""
    begun = []
    for index in range(number):
        suggestion = ledger.next()
        assert suggestion is not None
        begun.append(suggestion)
        if index in finished:
            finish(ledger, suggestion)
    return begun


def run(ledger: Ledger) -> list[Suggestion]:
    """One trial after the other until the ledger is done."""
    suggestions = []
    while (suggestion := ledger.next()) is not None:
        suggestions.append(suggestion)
        finish(ledger, suggestion)
    return suggestions


def test_an_untrainable_plan_scores_worse_than_all_others() -> None:
    """Its score is at the last step that any plan reached."""
    ledger = ledger_of(space_of(blocks(4)), maker("random"))
    ruined, good, bad = begin(ledger, 3)
    ledger.close(ruined, is_untrainable=True)
    # Nothing is known yet.
    assert ledger.history().observations == ()
    assert ledger.history().failed == (ruined.plan,)
    ledger.observe(Observation(good.index, good.plan, 4, 3.0))
    scores = [(item.index, item.step, item.score) for item in ledger.history().observations]
    assert scores == [(ruined.index, 4, pytest.approx(3.03)), (good.index, 4, 3.0)]
    ledger.observe(Observation(good.index, good.plan, 8, 2.9))
    ledger.observe(Observation(bad.index, bad.plan, 8, 3.4))
    assert (
        Observation(ruined.index, ruined.plan, 8, pytest.approx(3.9))
        in ledger.history().observations
    )
    assert ledger.history().failed == ()


@PROPOSERS
@pytest.mark.parametrize("levels", [("nf4", "int8"), ("nf4", "int8", "bf16")], ids=str)
def test_controls_first_no_plan_twice_none_over_budget(
    make: MakeProposer, levels: tuple[str, ...]
) -> None:
    space = space_of(blocks(8), levels, 0.4)
    suggestions = run(ledger_of(space, make))
    assert [(item.origin, item.plan) for item in suggestions[:2]] == controls_of(space)
    assert {item.origin for item in suggestions[2:]} == {make(space, 0).name}
    assert [item.index for item in suggestions] == list(range(12))
    assert len({item.plan for item in suggestions if space.is_feasible(item.plan)}) == 12


@PROPOSERS
def test_a_search_of_a_small_space_tries_every_plan_and_ends(make: MakeProposer) -> None:
    """The search ends by itself if `max_trials` is larger than the number of plans."""
    space = space_of(blocks(5))
    ledger = ledger_of(space, make, max_trials=100)
    assert {item.plan for item in run(ledger)} == set(filter(space.is_feasible, plans_in(space)))
    assert ledger.next() is None
    assert ledger.ended == "every plan inside the budget was tried"


@PROPOSERS
def test_a_proposal_depends_on_seed_number_and_results_only(make: MakeProposer) -> None:
    """It does not depend on the order in which results arrive, nor on global random states."""
    space = space_of(blocks(10))

    def following(seed: int, order: int) -> list[Suggestion | None]:
        ledger = Ledger(SearchSpace((space,)), make(space, seed), [], max_trials=20)
        running = begin(ledger, 9)
        random.Random(order).shuffle(running)
        random.seed(order)
        np.random.seed(order)
        for suggestion in running:
            finish(ledger, suggestion)
        return [ledger.next(), ledger.next()]

    assert following(0, 0) == following(0, 1) == following(0, 2)
    assert len({str(following(seed, 0)) for seed in range(4)}) > 1


@pytest.mark.parametrize("name", ["hyperopt", "bayesopt", "gp"])
def test_a_searcher_learns_from_what_ran(name: str) -> None:
    """After 30 results in favour of 8 bits in the first groups it proposes that more often than
    chance does."""
    space = space_of(blocks(8), share=1.0)
    plans = [space.plan_of(row) for row in np.random.default_rng(0).integers(2, size=(30, 8))]
    results = [
        Observation(
            index,
            plan,
            8,
            3.0 - 0.5 * plan.formats[:3].count("int8") + 0.5 * plan.formats[5:].count("int8"),
        )
        for index, plan in enumerate(plans)
    ]
    proposer = maker(name)(space, 0)
    history = History(tuple(results))
    number = 5 if name == "bayesopt" else 20
    proposed = (
        np.array([proposer.propose(index, history).formats for index in range(30, 30 + number)])
        == "int8"
    )
    assert proposed[:, :3].mean() > 0.65
    assert proposed[:, 5:].mean() < 0.35


@PROPOSERS
def test_a_failed_trial_is_not_learned_from_and_not_repeated(make: MakeProposer) -> None:
    space = space_of(blocks(8))
    with_failure = ledger_of(space, make)
    without = ledger_of(space, make)
    failed, _ = (
        begin(ledger, 6, finished=(0, 1, 2, 3, 5))[4] for ledger in (with_failure, without)
    )
    with_failure.close(failed)
    assert with_failure.history().failed == without.history().pending == (failed.plan,)
    if make(space, 0).name != "gp":  # gp expects something of what is still running
        assert with_failure.next() == without.next()
    assert failed.plan not in {item.plan for item in run(with_failure)}


@pytest.mark.parametrize("name", [*NAMES, "bayesopt"])
def test_a_resumed_search_proposes_the_same_plans(name: str) -> None:
    """Trials 3 and 5 were running when it was killed; they are handed out again before new ones."""
    space = space_of(blocks(9))
    max_trials = 10
    ledger, again = (ledger_of(space, maker(name), max_trials=max_trials) for _ in range(2))
    begun = begin(ledger, 7, finished=(0, 1, 2, 4, 6))
    ledger.observe(rungs_of(begun[5])[0])
    for suggestion in begun:
        if suggestion.index in (3, 5):
            again.recall(suggestion, rungs_of(suggestion)[: suggestion.index // 5])
            again.hand_out_again(suggestion)
        else:
            again.recall(suggestion, rungs_of(suggestion))
            again.close(suggestion)
    assert [again.next(), again.next()] == [begun[3], begun[5]]
    rest = run(again)
    assert [item.index for item in rest] == [7, 8, 9]
    assert rest == run(ledger)


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
        maker("bayesopt")(space_of(blocks(4)), 0)


# ---- proposals are made in a thread


class Gated:
    """Proposes random plans, once the gate is open, and keeps what it was asked."""

    name = "gated"

    def __init__(self, space: SearchSpace) -> None:
        self.gate = threading.Event()
        self.asked: list[tuple[int, History]] = []
        self._random = RandomProposer(space, 0)

    def propose(self, index: int, history: History) -> PrecisionPlan:
        self.gate.wait(60)
        self.asked.append((index, history))
        return self._random.propose(index, history)


def gated_ledger(max_trials: int = 12) -> tuple[Ledger, Gated]:
    space = space_of(blocks(9), share=1.0)
    proposer = Gated(SearchSpace((space,)))
    return Ledger(SearchSpace((space,)), proposer, controls_of(space), max_trials), proposer


def test_scores_are_taken_while_a_plan_is_being_proposed() -> None:
    ledger, proposer = gated_ledger()
    first, second = begin(ledger, 2)
    assert ledger.poll() is None
    assert ledger.is_proposing
    assert ledger.ended is None
    finish(ledger, first)
    # Nothing waits for the gate.
    assert len(ledger.history().observations) == len(STEPS)
    ledger.hand_out_again(second)
    # A trial that needs no proposal is handed out.
    assert ledger.poll() == second
    proposer.gate.set()
    assert ledger.next() is not None
    assert not ledger.is_proposing
    (_, history), *others = proposer.asked
    assert not others
    assert history.observations == ()


def test_a_batch_of_proposals_knows_its_own_plans_as_running() -> None:
    """The batch is as large as what is wanted, and no larger than the trials that are left."""
    ledger, proposer = gated_ledger(max_trials=6)
    controls = begin(ledger, 2)
    assert ledger.poll(64) is None
    finish(ledger, controls[0])
    proposer.gate.set()
    proposed = begin(ledger, 4)
    assert [item.index for item in proposed] == [index for index, _ in proposer.asked]
    running = [item.plan for item in (*controls, *proposed)]
    assert [list(history.pending) for _, history in proposer.asked] == [
        running[:number] for number in range(2, 6)
    ]
    assert ledger.next() is None
    assert ledger.ended is not None


def test_proposals_that_nobody_takes_are_dropped() -> None:
    ledger, proposer = gated_ledger()
    begin(ledger, 2)
    ledger.poll(8)
    ledger.drop_proposals()
    proposer.gate.set()
    assert ledger.next() is not None
    # They are the one that had begun and a new one.
    assert len(proposer.asked) <= 2


def test_an_error_of_a_searcher_reaches_who_asks() -> None:
    ledger, proposer = gated_ledger()
    begin(ledger, 2)
    proposer.gate.set()
    proposer.propose = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        ledger.next()


# ---- groups that are not offered every format, plans of another cut, controls over budget


@pytest.mark.parametrize("name", [*NAMES, "bayesopt"])
def test_no_searcher_proposes_what_a_group_is_not_offered(name: str) -> None:
    space = masked_space(0.6)
    number = 6 if name == "bayesopt" else 20
    whole = SearchSpace((space,))
    ledger = Ledger(whole, make_proposer(name, whole, 0, {}), [], number)
    proposed = [ledger.proposer.propose(index, History()) for index in range(100, 103)]
    suggestions = run(ledger)
    assert len({item.plan for item in suggestions}) == number
    assert all(space.is_feasible(item.plan) for item in suggestions)
    proposed += [ledger.proposer.propose(index, ledger.history()) for index in range(100, 103)]
    assert all(plan in space for plan in proposed)


@PROPOSERS
def test_plans_of_another_cut_and_over_budget_are_controls(make: MakeProposer) -> None:
    """They run first, whatever they are; the searcher sees those of its own cut alone, and none is
    proposed."""
    space = space_of(blocks(6), share=0.3)
    other = replace(space.uniform("nf4"), cut="cut-20")
    controls = [
        ("paper", other),
        *((f"uniform-{name}", space.uniform(name)) for name in ("int8", "nf4")),
    ]
    with_other, without = (
        Ledger(SearchSpace((space,)), make(space, 0), each, 40) for each in (controls, controls[1:])
    )
    suggestions = run(with_other)
    assert [(item.origin, item.plan) for item in suggestions[:3]] == controls
    assert all(space.is_feasible(item.plan) for item in suggestions[3:])
    # These are all plans, and those two.
    assert len(suggestions) == 2 + sum(map(space.is_feasible, plans_in(space)))
    known = {item.plan for item in with_other.history().observations}
    assert other not in known
    assert space.uniform("int8") in known
    ruined = begin(without, 2, finished=(1,))
    _ = with_other
    without.close(ruined[0], is_untrainable=True)
    assert [item.index for item in without.history().observations] == [0, 1, 1]


def test_a_ruined_plan_of_another_cut_is_not_learned_from() -> None:
    space = space_of(blocks(4))
    other = replace(space.uniform("nf4"), cut="cut-20")
    whole = SearchSpace((space,))
    ledger = Ledger(whole, RandomProposer(whole, 0), [("unpruned", other)], 4)
    ruined, good = begin(ledger, 2, finished=(1,))
    ledger.close(ruined, is_untrainable=True)
    assert {item.plan for item in ledger.history().observations} == {good.plan}
    assert ledger.history().failed == ledger.history().pending == ()
