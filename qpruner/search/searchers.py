"""Proposers of plans, and the ledger that turns their proposals into new plans inside the budget.

Ray is not used here.

What is reproducible: a proposal depends on the seed, its number and the history that it is made
from, and on nothing else. A search of one trial at a time always proposes from all results, so it
suggests the same plans again, and a search that is resumed goes on as if it had not stopped. With
several trials in flight, proposals are made in batches while other trials report. A batch knows
the results at its beginning and its own earlier plans, so the plans depend on the order of events.
"""

import importlib.metadata
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from qpruner.errors import UserError
from qpruner.plans.plan import PrecisionPlan
from qpruner.plans.space import SearchSpace, indices_offered

Prior = Mapping[str, Sequence[float | None]]
"""A sensitivity: for each format the predicted rise of the loss by every group, in nats or another
unit.

None where a group is not offered the format. The groups are in the order of `SearchSpace.groups`.
"""


@dataclass(frozen=True)
class Observation:
    """The score at one rung of the plan with the number `index`; lower is better.

    The rung is at `step` optimizer steps. No standard error is kept: all trials answer the same
    questions, so drawing these adds no noise between plans.
    """

    index: int
    plan: PrecisionPlan
    step: int
    score: float


@dataclass(frozen=True)
class History:
    """All that is known of the plans of a space, in order of their numbers."""

    observations: tuple[Observation, ...] = ()  # every rung of every trial, running ones included
    pending: tuple[PrecisionPlan, ...] = ()  # plans of running trials
    failed: tuple[PrecisionPlan, ...] = ()
    """Plans without a score; those that cannot be trained have one, see `Ledger`."""

    def last(self) -> list[Observation]:
        """Return the observation at the latest rung of each trial that is over."""
        running = set(self.pending)
        return list(
            {item.index: item for item in self.observations if item.plan not in running}.values()
        )


@dataclass(frozen=True)
class Suggestion:
    """A plan to run, with its number from 0 and its origin: a control or a searcher."""

    plan: PrecisionPlan
    index: int
    origin: str


class Proposer(Protocol):
    """Proposes a plan from a history."""

    @property
    def name(self) -> str:
        """Return the name of the searcher in the records."""

    def propose(self, index: int, history: History) -> PrecisionPlan:
        """Propose a plan, feasible or not, for suggestion `index`.

        Equal arguments give equal plans. The method is called in one thread, by `Ledger`.
        """


def check_searcher(name: str) -> None:
    """Raise `UserError` with the command to install the package of a searcher, if it is missing."""
    if name != "bayesopt":
        return
    version = "none"
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("bayesian-optimization")
    if not version.startswith("1."):  # Ray 2.60 uses `UtilityFunction`, which version 2 lacks
        raise UserError(
            "`search.searcher` is bayesopt, which needs bayesian-optimization 1, "
            f"got {version}: run "
            '`pip install "qpruner[bayesopt]"`'
        )


@dataclass(frozen=True)
class RandomProposer:
    """Proposes a uniformly random cut and levels; the baseline of the other searchers."""

    space: SearchSpace
    seed: int
    name: str = "random"

    def propose(self, index: int, history: History) -> PrecisionPlan:
        """Draw a plan."""
        generator = np.random.default_rng([self.seed, index])
        cut = int(generator.integers(len(self.space.cuts)))
        offered = indices_offered(self.space.tables[cut])
        drawn = generator.integers([len(levels) for levels in offered])
        levels = [of_group[at] for of_group, at in zip(offered, drawn, strict=True)]
        return self.space.plan_of([*levels, cut])


@dataclass
class _Batch:
    """Proposals that are made one after the other, in a thread, from one history."""

    proposer: Proposer
    history: History

    def propose(self, index: int) -> PrecisionPlan:
        """Propose a plan, which counts as running for the further proposals of this batch."""
        plan = self.proposer.propose(index, self.history)
        self.history = replace(self.history, pending=(*self.history.pending, plan))
        return plan


@dataclass
class Ledger:
    """Suggests the plans of a search one by one, the controls first, and keeps their scores.

    Proposals are made in a thread. All methods are called by one other thread, and only `next`
    waits for a proposal.

    A proposal over budget or known already gives way to the nearest new feasible plan. A plan that
    diverges or does not fit in memory counts as bad, not as unknown: at the last step that any plan
    has reached, it gets the worst score there plus the range of scores there; if all are equal, the
    score plus 1 %.
    """

    space: SearchSpace
    proposer: Proposer
    controls: Sequence[tuple[str, PrecisionPlan]]
    """Origin and plan of what is handed out first; of any cut and any size."""
    max_trials: int  # suggestions in all, without trials of another search
    proposes: bool = True  # False if only the controls are run
    ended: str | None = None  # why there are no more suggestions; None before that
    _known: dict[PrecisionPlan, int] = field(default_factory=dict)
    _inside: set[int] = field(default_factory=set)  # numbers of the known plans of the space
    _counted: set[int] = field(default_factory=set)
    _live: dict[int, PrecisionPlan] = field(default_factory=dict)
    _unfinished: list[Suggestion] = field(default_factory=list)
    _observations: dict[tuple[int, int], Observation] = field(default_factory=dict)
    _untrainable: dict[int, PrecisionPlan] = field(default_factory=dict)
    _proposals: deque[Future[PrecisionPlan]] = field(default_factory=deque)
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="proposer")
    )

    def recall(
        self, suggestion: Suggestion, rungs: Sequence[Observation], counts: bool = True
    ) -> None:
        """Add a recorded trial; call `close` or `hand_out_again` afterwards.

        Without `counts` it is not one of `max_trials`.
        """
        self._remember(suggestion)
        for rung in rungs:
            self.observe(rung)
        if counts:
            self._counted.add(suggestion.index)

    def next(self) -> Suggestion | None:
        """Return the next suggestion; None if the search is over, and `ended` then says why."""
        suggestion = self.poll()
        while suggestion is None and self._proposals:
            self._proposals[0].exception()  # waits; `poll` raises it
            suggestion = self.poll()
        return suggestion

    def poll(self, count: int = 1) -> Suggestion | None:
        """Return the next suggestion without waiting.

        Args:
            count: How many suggestions are wanted now. If a proposal is needed and none is in the
                making, up to so many are begun, from the results until now.

        Returns:
            None while a proposal is in the making (`is_proposing`), or if the search is over.
        """
        suggestion = self._unfinished.pop(0) if self._unfinished else self._new(count)
        if suggestion:
            self._live[suggestion.index] = suggestion.plan
        return suggestion

    @property
    def is_proposing(self) -> bool:
        """Whether proposals are in the making, or made and not handed out yet."""
        return bool(self._proposals)

    def drop_proposals(self) -> None:
        """Forget the proposals that were not handed out; the thread ends with its present one."""
        for proposal in self._proposals:
            proposal.cancel()
        self._proposals.clear()

    def observe(self, observation: Observation) -> bool:
        """Add the score of a rung; return whether it is new.

        A resumed trial reports its last rung again.
        """
        key = observation.index, observation.step
        is_new = key not in self._observations
        self._observations[key] = observation
        return is_new

    def close(self, suggestion: Suggestion, is_untrainable: bool = False) -> None:
        """Mark a trial as over; with `is_untrainable` its plan counts as bad."""
        self._live.pop(suggestion.index, None)
        if is_untrainable:
            self._untrainable[suggestion.index] = suggestion.plan

    def hand_out_again(self, suggestion: Suggestion) -> None:
        """Queue an unfinished trial, to be handed out before new ones.

        It will report its last rung again.
        """
        self._live.pop(suggestion.index, None)
        self._unfinished.append(suggestion)

    def withdraw(self, suggestion: Suggestion) -> None:
        """Remove a trial that never started; its plan and its number may be used again."""
        self._live.pop(suggestion.index, None)
        self._known.pop(suggestion.plan, None)
        self._inside.discard(suggestion.index)
        self._counted.discard(suggestion.index)

    def end(self, reason: str) -> None:
        """End the search after the trials that are running or queued.

        Only the first `reason` is kept.
        """
        self.ended = self.ended or reason

    def history(self) -> History:
        """Return what the searcher learns from: the observations and plans of its own space."""
        measured = [item for item in self._observations.values() if item.index in self._inside]
        scores = {(item.index, item.step): item for item in measured}
        for penalty in self._penalties(measured):
            scores[penalty.index, penalty.step] = penalty
        observations = tuple(scores[key] for key in sorted(scores))

        scored = {item.index for item in observations}
        pending = []
        failed = []
        for plan, index in sorted(self._known.items(), key=lambda item: item[1]):
            if index not in self._inside:
                continue
            if index in self._live:
                pending.append(plan)
            elif index not in scored:
                failed.append(plan)
        return History(observations, tuple(pending), tuple(failed))

    def _penalties(self, observed: Sequence[Observation]) -> list[Observation]:
        """Return bad scores for the plans that cannot be trained; none before the first score."""
        if not observed:
            return []
        step = max(item.step for item in observed)
        scores = [item.score for item in observed if item.step == step]
        worst = max(scores)
        score = worst + ((worst - min(scores)) or abs(worst) / 100)
        penalties = []
        for index, plan in self._untrainable.items():
            if index in self._inside and index not in self._live:
                penalties.append(Observation(index, plan, step, score))
        return penalties

    def _new(self, count: int) -> Suggestion | None:
        if self.ended:
            return None
        left = self.max_trials - len(self._counted)
        if left <= 0:
            self.end(f"all {self.max_trials} trials were spent (`search.max_trials`)")
            return None
        suggestion = self._control() or self._proposal(min(count, left))
        if suggestion:
            self._remember(suggestion)
            self._counted.add(suggestion.index)
        return suggestion

    def _control(self) -> Suggestion | None:
        for origin, plan in self.controls:
            if plan not in self._known:
                return Suggestion(plan, self._free_numbers(1)[0], origin)
        return None

    def _proposal(self, count: int) -> Suggestion | None:
        if not self.proposes:
            self.end("only one plan was to be tried (`search.plan`, or a single one is possible)")
            return None
        if not self._proposals:
            batch = _Batch(self.proposer, self.history())
            for index in self._free_numbers(count):
                self._proposals.append(self._thread.submit(batch.propose, index))
        if not self._proposals[0].done():
            return None
        plan = self._repaired(self._proposals.popleft().result())
        if plan is None:
            self.drop_proposals()
            self.end("every plan inside the budget was tried")
            return None
        return Suggestion(plan, self._free_numbers(1)[0], self.proposer.name)

    def _repaired(self, plan: PrecisionPlan) -> PrecisionPlan | None:
        """Return the plan if it is new and inside the budget, or else the nearest one that is."""
        if plan not in self._known and self.space.is_feasible(plan):
            return plan
        return self.space.nearest_feasible(plan, avoid=self._known)

    def _free_numbers(self, count: int) -> list[int]:
        taken = set(self._known.values())
        free = (number for number in itertools.count() if number not in taken)
        return list(itertools.islice(free, count))

    def _remember(self, suggestion: Suggestion) -> None:
        self._known[suggestion.plan] = suggestion.index
        if suggestion.plan in self.space:
            self._inside.add(suggestion.index)
