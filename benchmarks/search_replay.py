"""Replays of a search on measured losses: tables of every plan, surrogates of many groups, and one search on them.

A table is a JSON file: `groups`, `levels`, `group_bytes` {level: [bytes per group]}, `plans` [[level per group]],
`loss` per plan, `loss_noise` (of a repeat), `sensitivities` {method: {level: [predicted rise per group]}}, and where
trials report earlier, `rungs` {step: [loss per plan]}, the last of which equals `loss`; step 0 is before the fine-tune
and no trial reports it. A surrogate has `intercept`, `main` {level: [per group]} and `pairs`
[[group, level, group, level, value]] instead of plans and losses. A search goes through the same `make_proposer` and
`Ledger` as one under Ray Tune, without ASHA: every trial runs to its last rung.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qpruner.plan import PlanSpace, PrecisionPlan
from qpruner.search.searchers import History, Ledger, Observation, Proposal, Proposer, Suggestion
from qpruner.search.tune import make_proposer
from qpruner.sensitivity.seeds import seed_origin, seed_plan

NUM_TRIALS = 64
JITTER = 0.25
"""Standard deviation of the logarithm of a trial's duration, when several are in flight."""


@dataclass(frozen=True)
class Table:
    """A table or a surrogate, as its file has it."""

    name: str
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Table:
        return cls(path.stem, json.loads(path.read_text()))

    @property
    def is_surrogate(self) -> bool:
        return "plans" not in self.content

    @cached_property
    def levels(self) -> tuple[int, ...]:
        return tuple(self.content["levels"])

    @cached_property
    def sensitivities(self) -> dict[str, dict[int, list[float]]]:
        found = self.content.get("sensitivities", {})
        return {method: {int(bits): rise for bits, rise in values.items()} for method, values in found.items()}

    @cached_property
    def losses(self) -> dict[int, dict[tuple[int, ...], float]]:
        """Step -> plan -> loss; a table without rungs has the one step 0."""
        rungs = self.content.get("rungs") or {"0": self.content["loss"]}
        plans = [tuple(plan) for plan in self.content["plans"]]
        return {int(step): dict(zip(plans, losses, strict=True)) for step, losses in rungs.items()}

    @property
    def steps(self) -> tuple[int, ...]:
        """Rungs that a trial reports."""
        steps = (0,) if self.is_surrogate else tuple(sorted(self.losses))
        return tuple(step for step in steps if step > 0) or steps

    def score(self, bits: tuple[int, ...], step: int) -> float:
        if not self.is_surrogate:
            return self.losses[step][bits]
        main = sum(self.content["main"][str(level)][group] for group, level in enumerate(bits))
        pairs = sum(
            value
            for group, level, other, their_level, value in self.content["pairs"]
            if bits[group] == level and bits[other] == their_level
        )
        return float(self.content["intercept"] + main + pairs)

    def observed(self, bits: tuple[int, ...], step: int) -> float:
        """What a trial reports: a table's loss as it was measured; a surrogate's with what its fit leaves unexplained,
        drawn once for each plan, so that no searcher finds the surface smoother than the model is."""
        if not self.is_surrogate:
            return self.score(bits, step)
        seed = int.from_bytes(hashlib.sha256(repr(bits).encode()).digest()[:8], "big")
        rest = float(self.content.get("loss_noise", 0.0)) * np.random.default_rng(seed).standard_normal()
        return self.score(bits, step) + float(rest)

    def space(self, fraction: float) -> PlanSpace:
        """Plans within a budget between the smallest plan's bytes (0) and the largest's (1)."""
        by_level = [self.content["group_bytes"][str(level)] for level in self.levels]
        group_bytes = tuple(tuple(int(size) for size in sizes) for sizes in zip(*by_level, strict=True))
        lowest, highest = (sum(chosen(sizes) for sizes in group_bytes) for chosen in (min, max))
        fixed = int(self.content.get("fixed_bytes", 0))
        budget = fixed + int(lowest + fraction * (highest - lowest))
        return PlanSpace(tuple(self.content["groups"]), self.levels, group_bytes, fixed, budget)

    def feasible(self, space: PlanSpace) -> list[PrecisionPlan]:
        """Every plan inside the budget; of a table."""
        plans = [PrecisionPlan(space.groups, bits) for bits in self.losses[self.steps[-1]]]
        return [plan for plan in plans if space.is_feasible(plan)]

    def limits(self, space: PlanSpace) -> tuple[float, float]:
        """Losses of the best and the worst plan inside the budget.

        A surrogate's are those of the additive part, solved exactly, and improved by single moves and swaps of two
        groups, pairs counted, until none helps; so they are bounds that a search may still pass.
        """
        if not self.is_surrogate:
            losses = [self.score(plan.bits, self.steps[-1]) for plan in self.feasible(space)]
            return min(losses), max(losses)
        best, worst = (self._extreme(space, sign) for sign in (1.0, -1.0))
        return best, worst

    def _extreme(self, space: PlanSpace, sign: float) -> float:
        main = self.content["main"]
        gains = [[-sign * main[str(level)][group] for level in self.levels] for group in range(len(space.groups))]
        bits = np.array(space.best_by_gain(gains).bits)
        terms = _PairTerms(self)
        sizes = np.array(space.group_bytes)
        capacity = space.budget_bytes - space.fixed_bytes
        while True:
            change = sign * terms.changes(bits)
            at = np.array([self.levels.index(level) for level in bits])
            growth = sizes - sizes[np.arange(len(at)), at][:, None]
            room = capacity - sizes[np.arange(len(at)), at].sum()
            moves = [(group, level) for group, level in np.ndindex(change.shape) if level != at[group]]
            options = [(change[move], (move,)) for move in moves if growth[move] <= room]
            options += [
                (change[one] + change[two] + sign * terms.joint(bits, one, two), (one, two))
                for one, two in itertools.combinations(moves, 2)
                if one[0] != two[0] and growth[one] + growth[two] <= room
            ]
            gain, chosen = min(options, key=lambda option: option[0])
            if gain > -1e-12:
                return self.score(tuple(int(level) for level in bits), 0)
            for group, level in chosen:
                bits[group] = self.levels[level]


class _PairTerms:
    """How a surrogate's loss changes with one or two groups."""

    def __init__(self, table: Table) -> None:
        levels = table.levels
        self._levels = levels
        self._main = np.array([table.content["main"][str(level)] for level in levels]).T
        num_groups = len(self._main)
        self._pairs = np.zeros((num_groups, len(levels), num_groups, len(levels)))
        for group, level, other, their_level, value in table.content["pairs"]:
            self._pairs[group, levels.index(level), other, levels.index(their_level)] += value
            self._pairs[other, levels.index(their_level), group, levels.index(level)] += value

    def changes(self, bits: np.ndarray) -> np.ndarray:
        """``(groups, levels)``: of giving one group another level."""
        at = np.array([self._levels.index(level) for level in bits])
        rows = np.arange(len(at))
        values = self._main + self._pairs[:, :, rows, at].sum(2)
        changed: np.ndarray = values - values[rows, at][:, None]
        return changed

    def joint(self, bits: np.ndarray, one: tuple[int, int], two: tuple[int, int]) -> float:
        """What changing two groups adds to the sum of changing each."""
        was, theirs = self._levels.index(bits[one[0]]), self._levels.index(bits[two[0]])
        block = self._pairs[one[0], :, two[0], :]
        return float(block[one[1], two[1]] - block[was, two[1]] - block[one[1], theirs] + block[was, theirs])


@dataclass(frozen=True)
class Task:
    """One search to replay.

    Attributes:
        path: The table.
        fraction: The budget, between the smallest plan and the largest.
        searcher: As `search.searcher` names it.
        seeded: Whether uniform and seed plans run first and the searcher gets the sensitivities.
        in_flight: Trials at a time.
        seed: Seeds the searcher and the trials' durations.
    """

    path: Path
    fraction: float
    searcher: str
    seeded: bool
    in_flight: int
    seed: int


@dataclass(frozen=True)
class Replay:
    """What came of it.

    Attributes:
        task: What was replayed.
        losses: Of the trials, in the order in which they ended.
        best_seed: The lowest loss among the plans that were there before the searcher was asked; None when blind.
        proposals: Plans that the searcher proposed.
        wasted: Those that were over budget or known, and had to be repaired.
        seconds: Processor time of a proposal, on average.
    """

    task: Task
    losses: list[float]
    best_seed: float | None
    proposals: int
    wasted: int
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, line: str) -> Replay:
        content = json.loads(line)
        task = content.pop("task")
        return cls(Task(**{**task, "path": Path(task["path"])}), **content)


@dataclass
class _Witness:
    """Notes what a proposer proposes."""

    inner: Proposer
    proposed: dict[int, PrecisionPlan] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.inner.name

    def propose(self, index: int, history: History) -> Proposal:
        started = time.process_time()
        proposal = self.inner.propose(index, history)
        self.seconds += time.process_time() - started
        self.proposed[index] = proposal.plan
        return proposal


def controls_of(table: Table, space: PlanSpace) -> list[tuple[str, PrecisionPlan]]:
    """Every sensitivity's seed plan, and the uniform plans inside the budget."""
    uniform = [(f"uniform-{bits}", space.uniform(bits)) for bits in space.levels]
    seeds = [(seed_origin(method), seed_plan(values, space)) for method, values in table.sensitivities.items()]
    return seeds + [(origin, plan) for origin, plan in uniform if space.is_feasible(plan)]


def replay(task: Task) -> Replay:
    """Search the table until `NUM_TRIALS` trials have ended or every plan has run.

    With several in flight a trial's rungs are spread evenly over its duration, which is log-normal around one.
    """
    table = Table.read(task.path)
    space = table.space(task.fraction)
    controls = controls_of(table, space) if task.seeded else []
    priors = table.sensitivities if task.seeded else {}
    witness = _Witness(make_proposer(task.searcher, space, task.seed, priors))
    ledger = Ledger(space, witness, controls, NUM_TRIALS)
    generator = np.random.default_rng([task.seed, 2])
    started: list[Suggestion] = []
    losses: list[float] = []
    # (time, order of entry, suggestion, rung)
    events: list[tuple[float, int, Suggestion, int]] = []

    def start(now: float) -> None:
        suggestion = ledger.next()
        if suggestion is None:
            return
        started.append(suggestion)
        seconds = float(np.exp(JITTER * generator.standard_normal()))
        for rung in range(len(table.steps)):
            moment = now + seconds * (rung + 1) / len(table.steps)
            heapq.heappush(events, (moment, suggestion.index * len(table.steps) + rung, suggestion, rung))

    for _ in range(task.in_flight):
        start(0.0)
    while events:
        now, _, suggestion, rung = heapq.heappop(events)
        step = table.steps[rung]
        observed = table.observed(suggestion.plan.bits, step)
        ledger.observe(Observation(suggestion.index, suggestion.plan, step, observed))
        if step == table.steps[-1]:
            ledger.close(suggestion)
            losses.append(table.score(suggestion.plan.bits, step))
            start(now)
    wasted = sum(witness.proposed[item.index] != item.plan for item in started if item.index in witness.proposed)
    at_start = [table.score(plan.bits, table.steps[-1]) for _, plan in controls]
    return Replay(
        task,
        losses,
        min(at_start, default=None),
        len(witness.proposed),
        wasted,
        witness.seconds / max(1, len(witness.proposed)),
    )
