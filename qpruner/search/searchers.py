"""What proposes the next plan, and the ledger that keeps every proposal inside the budget and new.

Nothing here knows of Ray. A `Proposer` turns results into a plan; the `Ledger` hands out controls first, repairs a
proposal that is over budget to the nearest feasible plan, replaces one that is known, and remembers what ran.
Suggestion k depends only on the seed, k and the results known when it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qpruner.plan import PlanSpace, PrecisionPlan


@dataclass(frozen=True)
class Suggestion:
    """A plan to run. `index` counts suggestions from 0, `origin` says where the plan came from."""

    index: int
    origin: str
    plan: PrecisionPlan


@dataclass(frozen=True)
class Observation:
    """The score a suggestion ended with; smaller is better."""

    index: int
    plan: PrecisionPlan
    score: float


class Proposer(Protocol):
    """Proposes a plan, feasible or not, from what is known."""

    @property
    def name(self) -> str:
        """What the records call it."""
        ...

    def propose(self, index: int, observations: Sequence[Observation]) -> PrecisionPlan:
        """The plan for suggestion `index`; `observations` are in order of their indices."""
        ...


@dataclass(frozen=True)
class RandomProposer:
    """Uniform over levels, group by group: the control every searcher is compared with."""

    space: PlanSpace
    seed: int
    name: str = "random"

    def propose(self, index: int, observations: Sequence[Observation]) -> PrecisionPlan:
        generator = np.random.default_rng([self.seed, index])
        names = tuple(group.name for group in self.space.layout.groups)
        return PrecisionPlan(names, tuple(int(bits) for bits in generator.choice(self.space.levels, len(names))))


@dataclass
class Ledger:
    """Every plan of a search, in order.

    Attributes:
        space: The feasible plans.
        proposer: The searcher behind it.
        controls: (origin, plan) pairs that come first; all inside the budget.
        max_trials: Suggestions in all.
        unfinished: Suggestions of an interrupted search, handed out again before new ones.
    """

    space: PlanSpace
    proposer: Proposer
    controls: Sequence[tuple[str, PrecisionPlan]]
    max_trials: int
    unfinished: list[Suggestion] = field(default_factory=list)
    _known: dict[PrecisionPlan, int] = field(default_factory=dict)
    _observations: dict[int, Observation] = field(default_factory=dict)

    def recall(self, suggestion: Suggestion, score: float | None) -> None:
        """Take over a suggestion that an earlier session ran; `score` is None when it failed."""
        self._known[suggestion.plan] = suggestion.index
        self.observe(suggestion, score)

    def resume(self, suggestion: Suggestion) -> None:
        """Take over a suggestion that was still running."""
        self._known[suggestion.plan] = suggestion.index
        self.unfinished.append(suggestion)

    def next(self) -> Suggestion | None:
        """The next suggestion, or None when the trials are spent or every feasible plan is known."""
        if self.unfinished:
            return self.unfinished.pop(0)
        if len(self._known) >= self.max_trials:
            return None
        taken = set(self._known.values())
        index = next(number for number in itertools.count() if number not in taken)
        suggestion = self._control(index) or self._proposal(index)
        if suggestion:
            self._known[suggestion.plan] = index
        return suggestion

    def observe(self, suggestion: Suggestion, score: float | None) -> None:
        """Tell how a suggestion ended; the plan that ran is told, not the one that was proposed."""
        if score is not None:
            self._observations[suggestion.index] = Observation(suggestion.index, suggestion.plan, score)

    def _control(self, index: int) -> Suggestion | None:
        for origin, plan in self.controls:
            if plan not in self._known:
                return Suggestion(index, origin, plan)
        return None

    def _proposal(self, index: int) -> Suggestion | None:
        observations = [self._observations[known] for known in sorted(self._observations)]
        proposed = self.proposer.propose(index, observations)
        plan = self.space.nearest_feasible(proposed, avoid=self._known)
        return Suggestion(index, self.proposer.name, plan) if plan else None
