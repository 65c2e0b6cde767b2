"""Replays a search on a table of measured losses, with the package's own searchers, ledger, ASHA
and choice of winner.

A table is a JSON file, see `joint_table.py`: the bytes of every (cut, group, format), the plans
with their losses at each rung, and the sensitivities. `additive` stands for plans and losses in a
table of too many groups to try every plan: `intercept`, and for each format what each group adds.
The loss at the last rung counts as the truth. What a search sees has noise beside it, of standard
deviation `loss_noise`: a draw for each plan and training seed, the same at all rungs. As in a run,
the trials share one training seed, and finalists are trained again under a further one.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from qpruner.cluster.tune import make_proposer
from qpruner.cluster.tune.asha import RecordedAsha
from qpruner.cluster.tune.job import METRIC, TIME, plan_to_params
from qpruner.config.schema import RunConfig, SearchConfig
from qpruner.plans.plan import UNPRUNED, PrecisionPlan
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.quantization.formats import by_size
from qpruner.runs.records import RungAgreement
from qpruner.search import choice
from qpruner.search.rungs import agreements
from qpruner.search.searchers import History, Ledger, Observation, Proposer, Suggestion

SETTINGS = SearchConfig()
JITTER = 0.25  # standard deviation of the logarithm of a trial's duration, if several are in flight


@dataclass(frozen=True)
class Table:
    """A table as its file has it."""

    name: str
    content: dict[str, Any]

    @classmethod
    @cache
    def read(cls, path: Path) -> Table:
        """Read a file; raise `ValueError` if it has not one loss for each plan at each rung."""
        found = cls(path.stem, json.loads(path.read_text()))
        odd = [step for step, losses in found.rungs.items() if not np.isfinite(losses).all()]
        odd += [step for step, losses in found.rungs.items() if len(losses) != len(found.plans)]
        if odd or len(set(found.plans)) < len(found.plans):
            raise ValueError(
                f"{path}: `rungs` must have a number for each plan, and `plans` each plan once"
            )
        return found

    @cached_property
    def rungs(self) -> dict[int, list[float]]:
        """The losses of all plans, by step."""
        return {
            int(step): losses
            for step, losses in sorted(self.content.get("rungs", {"0": []}).items())
        }

    @cached_property
    def steps(self) -> list[int]:
        """The steps of the rungs."""
        return sorted(self.rungs)

    @cached_property
    def plans(self) -> tuple[PrecisionPlan, ...]:
        """All plans; none if the table is additive."""
        groups = tuple(self.content["groups"])
        return tuple(
            PrecisionPlan(groups, tuple(levels), cut)
            for cut, *levels in self.content.get("plans", ())
        )

    @cached_property
    def _losses(self) -> dict[int, dict[PrecisionPlan, float]]:
        return {
            step: dict(zip(self.plans, losses, strict=True)) for step, losses in self.rungs.items()
        }

    def loss(self, plan: PrecisionPlan, step: int | None = None) -> float:
        """Return the loss of a plan at a rung, the last one by default, without noise."""
        if "additive" not in self.content:
            return self._losses[self.steps[-1] if step is None else step][plan]
        added = sum(self.content["additive"][level][at] for at, level in enumerate(plan.formats))
        return float(self.content["additive"]["intercept"] + added)

    def noise(self, plan: PrecisionPlan, seed: str) -> float:
        """Draw what a training seed adds to the loss of a plan."""
        digest = hashlib.sha256(f"{plan.cut} {plan.formats} {seed}".encode()).digest()
        drawn = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal()
        return float(self.content.get("loss_noise") or 0.0) * float(drawn)

    @cached_property
    def offered(self) -> dict[tuple[str, int], set[str]]:
        """The formats of each (cut, group) in any plan."""
        every = [set(self.content["sensitivities"][self.method])] if not self.plans else []
        of_plans = {
            (plan.cut, at): set[str]() for plan in self.plans for at in range(len(plan.groups))
        }
        for plan in self.plans:
            for at, level in enumerate(plan.formats):
                of_plans[plan.cut, at].add(level)
        return of_plans or {
            (cut, at): every[0] for cut in self.cuts for at in range(len(self.content["groups"]))
        }

    @property
    def cuts(self) -> list[str]:
        """The cuts, least pruned first."""
        return list(self.content["cuts"])

    @property
    def method(self) -> str:
        """The sensitivity that chooses the plans of controls, as in a run."""
        return next(name for name in choice.BEST_FIRST if name in self.content["sensitivities"])

    def space_of(self, cut: str, budget: int) -> PlanSpace:
        """Return the plans of a cut."""
        about = self.content["cuts"][cut]
        groups = self.content["groups"]
        levels = by_size(tuple(set().union(*self.offered.values())))

        sizes = []
        for at in range(len(groups)):
            offered = self.offered[cut, at]
            sizes.append(
                tuple(
                    about["group_bytes"][level][at] if level in offered else None
                    for level in levels
                )
            )
        return PlanSpace(tuple(groups), levels, tuple(sizes), about["fixed_bytes"], budget, cut)

    def may_win(self, cut: str, flops_fraction: float) -> bool:
        """Return whether a cut computes little enough."""
        counts = self.content.get("multiply_adds")
        return not counts or counts[cut] <= flops_fraction * max(counts.values())

    def space(self, budget: int, flops_fraction: float = 1.0) -> SearchSpace:
        """Return what is searched, as `Context.space` does."""
        spaces = [
            self.space_of(cut, budget) for cut in self.cuts if self.may_win(cut, flops_fraction)
        ]
        fitting = tuple(space for space in spaces if space.is_feasible(space.smallest()))
        losses = self.content.get("after_cut", {})
        return SearchSpace(fitting, losses, self.content.get("damage", {}))

    def controls(self, budget: int, flops_fraction: float = 1.0) -> list[tuple[str, PrecisionPlan]]:
        """List the controls of a run but the paper's: its formats are not in the table."""
        found = []
        for space in (self.space_of(cut, budget) for cut in self.cuts):
            fits = self.may_win(space.cut, flops_fraction) and space.is_feasible(space.smallest())
            if space.cut == UNPRUNED or fits:
                found += choice.controls_of(space, self.content["sensitivities"][self.method])
        return found

    def best(self, budget: int, flops_fraction: float = 1.0) -> float:
        """Return the lowest loss of any plan that may win."""
        space = self.space(budget, flops_fraction)
        if self.plans:
            return min(self.loss(plan) for plan in self.plans if space.is_feasible(plan))
        return min(
            self.loss(choice.seed_plan(self.content["additive"], each)) for each in space.spaces
        )


@dataclass(frozen=True)
class Task:
    """A search to replay."""

    path: Path
    budget: int  # bytes
    searcher: str
    seed: int  # of searcher, noise and durations
    trials: int
    in_flight: int = 1
    asha: bool = True
    flops_fraction: float = 1.0
    blind: bool = False  # without controls and sensitivities


@dataclass(frozen=True)
class EndedTrial:
    """A trial that is over."""

    plan: PrecisionPlan
    loss: float  # at the last rung, also of a stopped trial, without noise
    # at the last rung under the seed of the trials and under a further one
    scores: tuple[float, float]
    control: bool
    fits: bool  # may win
    finished: bool
    spent: int  # steps of all trials until its end


@dataclass(frozen=True)
class Replay:
    """A replayed search: its trials in the order in which they ended."""

    task: Task
    trials: list[EndedTrial]
    repaired: int  # proposals that were over budget or known

    def returned(self, number: int, as_if_finished: bool = False) -> EndedTrial | None:
        """Return the winner after `number` trials; `as_if_finished`: stopped ones compete too, by
        their last rung."""
        done = [trial for trial in self.trials[:number] if trial.finished or as_if_finished]
        are_controls = [trial.control for trial in done]
        scores = [trial.scores[0] for trial in done]
        fit = [trial.fits for trial in done]
        chosen = choice.finalist_positions(scores, are_controls, SETTINGS.confirm, fit)
        finalists = [done[at] for at in chosen if done[at].fits]
        fresh = [trial.scores[0] for trial in finalists]
        are_controls = [trial.control for trial in finalists]
        again = choice.contenders(fresh, are_controls, SETTINGS.confirm)
        means = [
            sum(each.scores) / 2 if at in again else each.scores[0]
            for at, each in enumerate(finalists)
        ]
        position = choice.winner_position(
            means, are_controls, [1 + (at in again) for at in range(len(means))]
        )
        return None if position is None else finalists[position]

    def regrets(self) -> list[float]:
        """Return the regret in nats if the search ended with each of its trials."""
        task = self.task
        best = Table.read(task.path).best(task.budget, task.flops_fraction)
        found = [self.returned(number) for number in range(1, len(self.trials) + 1)]
        return [each.loss - best if each else float("inf") for each in found]


class _Asha:
    """The scheduler of a run, called as Ray Tune's controller calls it."""

    def __init__(
        self, table: Table, space: SearchSpace, controls: Collection[PrecisionPlan]
    ) -> None:
        settings = SearchConfig(steps=table.steps[-1], first_rung=table.steps[0])
        # Of the configuration it reads `search` alone, and a whole one would name a model.
        config = RunConfig.model_construct(search=settings)
        self._scheduler = RecordedAsha(config, space, controls, [], lambda trial_id: False)
        self._table = table
        self._space = space
        self._trials = dict[int, SimpleNamespace]()

    def stops(self, suggestion: Suggestion, step: int, score: float) -> bool:
        """Return whether a trial that reports a rung ends there."""
        index = suggestion.index
        plan = suggestion.plan
        if index not in self._trials:
            plan_bytes = self._table.space_of(plan.cut, self._space.budget_bytes).plan_bytes(plan)
            about = {
                "trial": index,
                "cut": plan.cut,
                "plan_bytes": plan_bytes,
                **plan_to_params(plan),
            }
            self._trials[index] = SimpleNamespace(trial_id=str(index), config=about)
            self._scheduler.on_trial_add(None, self._trials[index])
        action = self._scheduler.on_trial_result(
            None, self._trials[index], {METRIC: score, TIME: step}
        )
        return bool(action == RecordedAsha.STOP)


@dataclass
class _Witness:
    """Keeps what a proposer proposes."""

    inner: Proposer
    plans: list[PrecisionPlan] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    def propose(self, index: int, history: History) -> PrecisionPlan:
        self.plans.append(self.inner.propose(index, history))
        return self.plans[-1]


def replay(task: Task) -> Replay:
    """Search a table; with several trials in flight, rungs are spread evenly over durations,
    log-normal around one."""
    table = Table.read(task.path)
    steps = table.steps
    space = table.space(task.budget, task.flops_fraction)
    controls = [] if task.blind else table.controls(task.budget, task.flops_fraction)
    of_controls = [plan for _, plan in controls]
    priors = {} if task.blind else table.content["sensitivities"]
    witness = _Witness(make_proposer(task.searcher, space, task.seed, priors))
    ledger = Ledger(space, witness, controls, task.trials)
    asha = _Asha(table, space, of_controls) if task.asha and len(steps) > 1 else None
    generator = np.random.default_rng([task.seed, 2])
    started = list[Suggestion]()
    ended = dict[int, EndedTrial]()
    spent = 0
    events: list[tuple[float, int, Suggestion, int]] = []  # (time, order, suggestion, rung)

    def fill(now: float) -> None:
        while len(started) - len(ended) < task.in_flight and (suggestion := ledger.next()):
            started.append(suggestion)
            seconds = float(np.exp(JITTER * generator.standard_normal())) / len(steps)
            for rung in range(len(steps)):
                order = suggestion.index * len(steps) + rung
                heapq.heappush(events, (now + seconds * (rung + 1), order, suggestion, rung))

    fill(0.0)
    while events:
        now, _, suggestion, rung = heapq.heappop(events)
        index = suggestion.index
        plan = suggestion.plan
        step = steps[rung]
        if index in ended:
            continue
        spent += step - (steps[rung - 1] if rung else 0)
        own, further = (table.noise(plan, f"{task.seed} {which}") for which in ("own", "further"))
        score = table.loss(plan, step) + own
        loss = table.loss(plan)
        finished = rung == len(steps) - 1
        ledger.observe(Observation(index, plan, step, score))
        if finished or (asha and asha.stops(suggestion, step, score)):
            ledger.close(suggestion)
            about = (plan in of_controls, space.is_feasible(plan), finished, spent)
            ended[index] = EndedTrial(plan, loss, (loss + own, loss + further), *about)
            fill(now)
    given = [item.plan for item in started if item.origin == witness.name]
    repaired = sum(one != other for one, other in zip(witness.plans, given, strict=False))
    return Replay(task, list(ended.values()), repaired)


def agreement(table: Table, space: SearchSpace) -> Sequence[RungAgreement]:
    """Return how each rung ranks all plans of a space, within and across cuts."""
    inside = [plan for plan in table.plans if space.is_feasible(plan)]
    trials = [(plan.cut, {step: table.loss(plan, step) for step in table.steps}) for plan in inside]
    return agreements(trials, table.steps[-1])
