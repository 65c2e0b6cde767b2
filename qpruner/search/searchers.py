"""Proposers of plans, and the ledger that turns proposals into new plans inside the budget; Ray is
not used here.

Suggestion k depends only on the seed, k and the results known when it is asked for.
"""

import importlib.metadata
import itertools
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qpruner.errors import UserError
from qpruner.plans.plan import PrecisionPlan
from qpruner.plans.space import SearchSpace

Prior = Mapping[str, Sequence[float | None]]
"""A sensitivity: for each format the predicted rise of the loss by every group, in nats or another
unit.

None where a group is not offered the format. The groups are in the order of `SearchSpace.groups`.
"""


@dataclass(frozen=True)
class Observation:
    """The score of the plan proposed as number `index`, at the rung of `step` optimizer steps;
    lower is better.

    No standard error is kept: all trials answer the same questions, so drawing these adds no noise
    between plans.
    """

    index: int
    plan: PrecisionPlan
    step: int
    score: float


@dataclass(frozen=True)
class History:
    """All that is known of the plans of a space when one is proposed, in order of the suggestions'
    indices."""

    observations: tuple[Observation, ...] = ()  # every rung of every trial, running ones included
    pending: tuple[PrecisionPlan, ...] = ()  # plans of running trials
    failed: tuple[
        PrecisionPlan, ...
    ] = ()  # without a score; plans that cannot be trained have one, see `Ledger`

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
        """Propose a plan for suggestion `index`, feasible or not; equal arguments give equal plans."""


def check_searcher(name: str) -> None:
    """Raise `UserError` with the command to install the package of a searcher, if it is missing."""
    if name != "bayesopt":
        return
    found = "none"
    with suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version("bayesian-optimization")
    if not found.startswith("1."):  # Ray 2.60 uses `UtilityFunction`, which version 2 lacks
        raise UserError(
            f"`search.searcher` is bayesopt, which needs bayesian-optimization 1, got {found}: run "
            '`pip install "qpruner[bayesopt]"`'
        )


@dataclass(frozen=True)
class RandomProposer:
    """Proposes a uniformly random cut, and level for each group, as the baseline of the other
    searchers."""

    space: SearchSpace
    seed: int
    name: str = "random"

    def propose(self, index: int, history: History) -> PrecisionPlan:
        """Draw a plan."""
        generator = np.random.default_rng([self.seed, index])
        cut = int(generator.integers(len(self.space.cuts)))
        offered = self.space.aligned[cut].offered
        drawn = generator.integers([len(levels) for levels in offered])
        return self.space.plan_of(
            (*(levels[at] for levels, at in zip(offered, drawn, strict=True)), cut)
        )


@dataclass
class Ledger:
    """Suggests the plans of a search one by one, the controls first, and keeps their scores.

    A proposal over budget or known already gives way to the nearest new feasible plan. A plan that
    diverges or does not fit in memory counts as bad, not as unknown: at the last step that any plan
    has reached, it gets the worst score there plus the range of scores there; if all are equal, the
    score plus 1 %.
    """

    space: SearchSpace
    proposer: Proposer
    controls: Sequence[
        tuple[str, PrecisionPlan]
    ]  # (origin, plan), handed out first; of any cut, any size
    max_trials: int  # suggestions in all, without trials of another search
    proposes: bool = True  # False if only the controls are run
    ended: str | None = None  # why there are no more suggestions; None before that
    _known: dict[PrecisionPlan, int] = field(default_factory=dict)
    _counted: set[int] = field(default_factory=set)
    _live: dict[int, PrecisionPlan] = field(default_factory=dict)
    _unfinished: list[Suggestion] = field(default_factory=list)
    _observations: dict[tuple[int, int], Observation] = field(default_factory=dict)
    _untrainable: dict[int, PrecisionPlan] = field(default_factory=dict)

    def recall(
        self, suggestion: Suggestion, rungs: Sequence[Observation], counts: bool = True
    ) -> None:
        """Add a recorded trial, before `close` or `hand_out_again`; without `counts` it is not one
        of `max_trials`."""
        self._known[suggestion.plan] = suggestion.index
        for rung in rungs:
            self.observe(rung)
        if counts:
            self._counted.add(suggestion.index)

    def next(self) -> Suggestion | None:
        """Return the next suggestion, or None when the search is over; `ended` then says why."""
        suggestion = self._unfinished.pop(0) if self._unfinished else self._new()
        if suggestion:
            self._live[suggestion.index] = suggestion.plan
        return suggestion

    def observe(self, observation: Observation) -> bool:
        """Add the score of a rung; return False if it was known, as when a resumed trial reports it
        again."""
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
        """Queue an unfinished trial to be handed out before new ones; it will report its last rung
        again."""
        self._live.pop(suggestion.index, None)
        self._unfinished.append(suggestion)

    def withdraw(self, suggestion: Suggestion) -> None:
        """Remove a trial that never started; its plan and its number may be used again."""
        self._live.pop(suggestion.index, None)
        self._known.pop(suggestion.plan, None)
        self._counted.discard(suggestion.index)

    def end(self, reason: str) -> None:
        """End the search after the trials that are running or queued; only the first `reason` is
        kept."""
        self.ended = self.ended or reason

    def history(self) -> History:
        """Return the observations and plans that the searcher learns from: those of its own space."""
        observed = {
            key: item for key, item in self._observations.items() if item.plan in self.space
        }
        known = observed | self._penalties(observed.values())
        seen = {index for index, _ in known} | self._live.keys()
        by_index = sorted(
            (item for item in self._known.items() if item[0] in self.space),
            key=lambda item: item[1],
        )
        return History(
            tuple(known[key] for key in sorted(known)),
            tuple(plan for plan, index in by_index if index in self._live),
            tuple(plan for plan, index in by_index if index not in seen),
        )

    def _penalties(self, observed: Collection[Observation]) -> dict[tuple[int, int], Observation]:
        """Return bad scores for the plans that cannot be trained; none before the first score."""
        if not observed:
            return {}
        step = max(item.step for item in observed)
        scores = [item.score for item in observed if item.step == step]
        worst, best = max(scores), min(scores)
        score = worst + ((worst - best) or abs(worst) / 100)
        untrainable = {
            index: plan
            for index, plan in self._untrainable.items()
            if index not in self._live and plan in self.space
        }
        return {
            (index, step): Observation(index, plan, step, score)
            for index, plan in untrainable.items()
        }

    def _new(self) -> Suggestion | None:
        if self.ended:
            return None
        if len(self._counted) >= self.max_trials:
            self.end(f"all {self.max_trials} trials were spent (`search.max_trials`)")
            return None
        taken = set(self._known.values())
        index = next(number for number in itertools.count() if number not in taken)
        control = next(
            (control for control in self.controls if control[1] not in self._known), None
        )
        suggestion = Suggestion(control[1], index, control[0]) if control else self._proposal(index)
        if suggestion:
            self._known[suggestion.plan] = index
            self._counted.add(index)
        return suggestion

    def _proposal(self, index: int) -> Suggestion | None:
        if not self.proposes:
            self.end("only one plan was to be tried (`search.plan`, or a single one is possible)")
            return None
        plan = self.space.nearest_feasible(
            self.proposer.propose(index, self.history()), avoid=self._known
        )
        if plan is None:
            self.end("every plan inside the budget was tried")
            return None
        return Suggestion(plan, index, self.proposer.name)
