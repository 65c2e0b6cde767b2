"""Replays of a search on measured losses: tables of every plan, surrogates of many groups, and one search on them.

A table is a JSON file: `groups`, `levels` (names of formats; 4, 8 and 16 stand for nf4, int8 and bf16), `group_bytes`
{level: [bytes per group]}, `plans` [[level per group]],
`loss` per plan, `loss_noise` (of a repeat), `sensitivities` {method: {level: [predicted rise per group]}}, and where
trials report earlier, `rungs` {step: [loss per plan]}, the last of which equals `loss`; step 0 is before the fine-tune
and no trial reports it. A surrogate has `intercept`, `main` {level: [per group]} and `pairs`
[[group, level, group, level, value]] instead of plans and losses. A search goes through the same controls,
`make_proposer`, `Ledger` and, where it is asked for, ASHA as one under Ray Tune, and its winner is chosen by the same
code: what counts is the loss of the plan that a run would have returned.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from qpruner.cluster.tune import make_proposer
from qpruner.cluster.tune.asha import RecordedAsha
from qpruner.cluster.tune.job import METRIC, TIME, plan_to_params
from qpruner.config.schema import RunConfig, SearchConfig, SensitivityConfig
from qpruner.plans.plan import PrecisionPlan
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.quantization.formats import ALIASES, by_size
from qpruner.search.choice import BEST_FIRST, controls_of, finalist_positions, winner_position
from qpruner.search.searchers import History, Ledger, Observation, Proposal, Proposer, Suggestion

NUM_TRIALS = 64
BITS = {name: bits for bits, name in ALIASES.items()}
CONFIRM = SearchConfig().confirm
"""Best trials that are scored again before one is returned."""
JITTER = 0.25
"""Standard deviation of the logarithm of a trial's duration, when several are in flight."""
MAX_COUNTED = 2**16
"""Plans of a space whose losses are counted before they are asked for."""


class BadTable(ValueError):
    """A file that is no table."""


@dataclass(frozen=True)
class Table:
    """A table or a surrogate, as its file has it."""

    name: str
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a file.

        Raises:
            BadTable: Naming the file, the field and what is wrong with it.
        """
        try:
            found = cls(path.stem, _named(json.loads(path.read_text())))
            problem = _problem_with(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadTable(f"{path} is no table: {type(error).__name__} {error}") from error
        if problem:
            raise BadTable(f"{path}: {problem}")
        return found

    @property
    def is_surrogate(self) -> bool:
        return "plans" not in self.content

    @cached_property
    def levels(self) -> tuple[str, ...]:
        """Smallest first, in whatever order the file has them."""
        return by_size(tuple(self.content["levels"]))

    @cached_property
    def sensitivities(self) -> dict[str, dict[str, list[float]]]:
        """By method, in the order in which a run measures them, and hands out their seeds; a level that is left out, as
        that of the unquantized weights, raises nothing."""
        found, known = self.content.get("sensitivities", {}), SensitivityConfig().methods
        order = [*(method for method in known if method in found), *(method for method in found if method not in known)]
        nothing = [0.0] * len(self.content["groups"])
        return {method: {level: found[method].get(level, nothing) for level in self.levels} for method in order}

    @cached_property
    def losses(self) -> dict[int, dict[tuple[str, ...], float]]:
        """Step -> plan -> loss; a table without rungs has the one step 0."""
        rungs = self.content.get("rungs") or {"0": self.content["loss"]}
        plans = [tuple(plan) for plan in self.content["plans"]]
        return {int(step): dict(zip(plans, losses, strict=True)) for step, losses in rungs.items()}

    @property
    def steps(self) -> tuple[int, ...]:
        """Rungs that a trial reports."""
        steps = (0,) if self.is_surrogate else tuple(sorted(self.losses))
        return tuple(step for step in steps if step > 0) or steps

    @property
    def pairs(self) -> list[tuple[int, str, int, str, float]]:
        """Of a surrogate: (group, level, other group, its level, what both together add to the loss)."""
        return list(self.content.get("pairs", ()))

    def score(self, plan: tuple[str, ...], step: int) -> float:
        if not self.is_surrogate:
            return self.losses[step][plan]
        main = sum(self.content["main"][level][group] for group, level in enumerate(plan))
        pairs = sum(
            value
            for group, level, other, their_level, value in self.pairs
            if plan[group] == level and plan[other] == their_level
        )
        return float(self.content["intercept"] + main + pairs)

    def measured(self, plan: tuple[str, ...], step: int, of: tuple[int, str]) -> float:
        """The score with the table's `loss_noise`: one draw for a plan and a measurement `of` it, whatever the rung."""
        noise = float(self.content.get("loss_noise", 0.0))
        if noise == 0.0:
            return self.score(plan, step)
        # In bits where that is possible: the draws are those of replays from before formats had names.
        told = tuple(BITS.get(level, level) for level in plan)
        seed = int.from_bytes(hashlib.sha256(repr((told, of)).encode()).digest()[:8], "big")
        return self.score(plan, step) + noise * float(np.random.default_rng(seed).standard_normal())

    def space(self, fraction: float) -> PlanSpace:
        """Plans within a budget between the smallest plan's bytes (0) and the largest's (1)."""
        by_level = [self.content["group_bytes"][level] for level in self.levels]
        group_bytes = tuple(tuple(int(size) for size in sizes) for sizes in zip(*by_level, strict=True))
        lowest, highest = (sum(chosen(sizes) for sizes in group_bytes) for chosen in (min, max))
        fixed = int(self.content.get("fixed_bytes", 0))
        budget = fixed + int(lowest + fraction * (highest - lowest))
        return PlanSpace(tuple(self.content["groups"]), self.levels, group_bytes, fixed, budget)

    def check_whole(self, fraction: float) -> None:
        """See that a table of few plans has the loss of every one inside a budget, before any is asked for.

        Raises:
            BadTable: If it lacks one.
        """
        space = self.space(fraction)
        if self.is_surrogate or len(self.levels) ** len(space.groups) > MAX_COUNTED:
            return
        sizes = [space.fixed_bytes + sum(plan) for plan in itertools.product(*space.group_bytes)]
        inside, known = sum(size <= space.budget_bytes for size in sizes), len(self.feasible(space))
        if known < inside:
            raise BadTable(f"{self.name}: `plans` has {known} of the {inside} plans inside a budget of {fraction}")

    def feasible(self, space: PlanSpace) -> list[PrecisionPlan]:
        """Every plan inside the budget; of a table."""
        plans = [PrecisionPlan(space.groups, formats) for formats in self.losses[self.steps[-1]]]
        return [plan for plan in plans if space.is_feasible(plan)]

    def limits(self, space: PlanSpace) -> tuple[float, float]:
        """Losses of the best and the worst plan inside the budget.

        A surrogate's are those of the additive part, solved exactly, and improved by single moves and swaps of two
        groups, pairs counted, until none helps; so they are bounds that a search may still pass.
        """
        if not self.is_surrogate:
            losses = [self.score(plan.formats, self.steps[-1]) for plan in self.feasible(space)]
            return min(losses), max(losses)
        best, worst = (self._extreme(space, sign) for sign in (1.0, -1.0))
        return best, worst

    def _extreme(self, space: PlanSpace, sign: float) -> float:
        main = self.content["main"]
        gains = [[-sign * main[level][group] for level in self.levels] for group in range(len(space.groups))]
        at = np.array(space.indices_of(space.best_by_gain(gains)))
        terms = _PairTerms(self)
        sizes = np.array(space.group_bytes)
        capacity = space.budget_bytes - space.fixed_bytes
        while True:
            change = sign * terms.changes(at)
            growth = sizes - sizes[np.arange(len(at)), at][:, None]
            room = capacity - sizes[np.arange(len(at)), at].sum()
            moves = [(group, level) for group, level in np.ndindex(change.shape) if level != at[group]]
            options = [(change[move], (move,)) for move in moves if growth[move] <= room]
            options += [
                (change[one] + change[two] + sign * terms.joint(at, one, two), (one, two))
                for one, two in itertools.combinations(moves, 2)
                if one[0] != two[0] and growth[one] + growth[two] <= room
            ]
            gain, chosen = min(options, key=lambda option: option[0])
            if gain > -1e-12:
                return self.score(space.plan_of(at).formats, 0)
            for group, level in chosen:
                at[group] = level


def _named(content: dict[str, Any]) -> dict[str, Any]:
    """A table's content with names of formats for levels, also where its file has bits."""

    def name(level: Any) -> str:
        is_number = isinstance(level, int) or level.isdigit()
        return str(ALIASES.get(int(level), level)) if is_number else str(level)

    def by_name(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name(level): value for level, value in values.items()}

    found = content | {"levels": [name(level) for level in content["levels"]]}
    found |= {key: by_name(content[key]) for key in ("group_bytes", "main") if key in content}
    found["sensitivities"] = {method: by_name(values) for method, values in content.get("sensitivities", {}).items()}
    found["pairs"] = [(a, name(one), b, name(two), value) for a, one, b, two, value in content.get("pairs", ())]
    if "plans" in content:
        found["plans"] = [[name(level) for level in plan] for plan in content["plans"]]
    return found


def _problem_with(table: Table) -> str | None:
    """What is wrong with a table's content, in one line."""
    content, levels, groups = table.content, table.levels, table.content["groups"]
    if len(set(levels)) < 2 or len(set(levels)) < len(levels):
        return f"`levels` must be two or more different formats, got {content['levels']}"
    if not groups or len(set(groups)) < len(groups):
        return f"`groups` must be different names, got {groups}"
    by_level = {f"`group_bytes` at {level}": content["group_bytes"][level] for level in levels}
    for method, values in content.get("sensitivities", {}).items():
        lacking = [level for level in levels[:-1] if values and level not in values]
        if lacking:
            return f"`sensitivities.{method}` lacks {lacking[0]}; only the highest level may be left out"
        by_level |= {f"`sensitivities.{method}` at {level}": each for level, each in values.items()}
    if table.is_surrogate:
        by_level |= {f"`main` at {level}": content["main"][level] for level in levels}
    for name, each in by_level.items():
        if len(each) != len(groups) or not np.isfinite(np.array(each, dtype=float)).all():
            return f"{name} must be {len(groups)} numbers, one a group"
    if table.is_surrogate:
        return None
    plans = [tuple(plan) for plan in content["plans"]]
    odd = next((plan for plan in plans if len(plan) != len(groups) or not set(plan) <= set(levels)), None)
    if odd is not None:
        return f"`plans` must have {len(groups)} of the levels {list(levels)} each, got {list(odd)}"
    if len(set(plans)) < len(plans):
        return f"`plans` has {len(plans) - len(set(plans))} plans more than once"
    rungs = {f"`rungs` at {step}": losses for step, losses in (content.get("rungs") or {}).items()}
    for name, losses in (rungs or {"`loss`": content["loss"]}).items():
        if len(losses) != len(plans) or not np.isfinite(np.array(losses, dtype=float)).all():
            return f"{name} must be {len(plans)} numbers, one a plan"
    return None


class _PairTerms:
    """How a surrogate's loss changes with one or two groups."""

    def __init__(self, table: Table) -> None:
        levels = table.levels
        self._main = np.array([table.content["main"][level] for level in levels]).T
        num_groups = len(self._main)
        self._pairs = np.zeros((num_groups, len(levels), num_groups, len(levels)))
        for group, level, other, their_level, value in table.pairs:
            self._pairs[group, levels.index(level), other, levels.index(their_level)] += value
            self._pairs[other, levels.index(their_level), group, levels.index(level)] += value

    def changes(self, at: np.ndarray) -> np.ndarray:
        """``(groups, levels)``: of giving one group of a plan, by index, another level."""
        rows = np.arange(len(at))
        values = self._main + self._pairs[:, :, rows, at].sum(2)
        changed: np.ndarray = values - values[rows, at][:, None]
        return changed

    def joint(self, at: np.ndarray, one: tuple[int, int], two: tuple[int, int]) -> float:
        """What changing two groups adds to the sum of changing each."""
        was, theirs = at[one[0]], at[two[0]]
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
        seed: Seeds the searcher, the noise and the trials' durations.
        asha: Whether ASHA stops trials at rungs.
    """

    path: Path
    fraction: float
    searcher: str
    seeded: bool
    in_flight: int
    seed: int
    asha: bool = False


@dataclass(frozen=True)
class EndedTrial:
    """A trial that is over.

    Attributes:
        index: Counts suggestions.
        loss: Of its plan at the last rung, without noise: what regret is told in.
        score: What it reported last, with noise.
        fresh: What scoring it again on fresh rows gives: another draw of the noise.
        control: Whether it was there before the searcher was asked.
        finished: Whether it reached the last rung.
        spent: Steps that all trials together had run when it ended.
    """

    index: int
    loss: float
    score: float
    fresh: float
    control: bool
    finished: bool
    spent: int


@dataclass(frozen=True)
class Replay:
    """What came of a search.

    Attributes:
        task: What was replayed.
        trials: In the order in which they ended.
        best_seed: The lowest loss among the controls, without noise; None when blind.
        promises: Suggestion -> expected improvement and noise that its proposal came with, where the searcher has a
            model.
        proposals: Plans that the searcher proposed.
        wasted: Those that were over budget or known, and had to be repaired.
        seconds: Processor time of a proposal, on average.
        duration: Of the search, in median durations of a whole trial.
    """

    task: Task
    trials: list[EndedTrial]
    best_seed: float | None
    promises: dict[int, tuple[float, float]]
    proposals: int
    wasted: int
    seconds: float
    duration: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, line: str) -> Replay:
        content = json.loads(line)
        task, trials, promises = (content.pop(key) for key in ("task", "trials", "promises"))
        return cls(
            Task(**{**task, "path": Path(task["path"])}),
            [EndedTrial(**trial) for trial in trials],
            promises={int(index): tuple(promise) for index, promise in promises.items()},
            **content,
        )

    def returned(self) -> list[float]:
        """Loss of the plan that the search would return if it ended with each of its trials; infinite where none has
        finished."""
        return [self._returned(self.trials[:number]) for number in range(1, len(self.trials) + 1)]

    def _returned(self, trials: list[EndedTrial]) -> float:
        finished = sorted((trial for trial in trials if trial.finished), key=lambda trial: trial.index)
        chosen = finalist_positions([trial.score for trial in finished], [trial.control for trial in finished], CONFIRM)
        again = [finished[position] for position in chosen]
        position = winner_position([trial.fresh for trial in again], [trial.control for trial in again])
        return float("inf") if position is None else again[position].loss

    def with_patience(self, patience: int) -> Replay:
        """The same search, ended after so many proposals in a row that promise less than the noise; what was in flight
        then has finished."""
        in_a_row = 0
        for index, (improvement, noise) in sorted(self.promises.items()):
            in_a_row = in_a_row + 1 if improvement < noise else 0
            if in_a_row == patience:
                return replace(self, trials=[trial for trial in self.trials if trial.index < index])
        return self


@dataclass
class _Witness:
    """Notes what a proposer proposes."""

    inner: Proposer
    proposed: dict[int, Proposal] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.inner.name

    def propose(self, index: int, history: History) -> Proposal:
        started = time.process_time()
        proposal = self.inner.propose(index, history)
        self.seconds += time.process_time() - started
        self.proposed[index] = proposal
        return proposal


class _Asha:
    """The scheduler of a run, called as Ray Tune's controller calls it."""

    def __init__(self, table: Table, space: PlanSpace, controls: Collection[PrecisionPlan]) -> None:
        settings = SearchConfig(steps=table.steps[-1], first_rung=table.steps[0])
        # Of the configuration it reads `search` alone, and a whole one would name a model.
        config = RunConfig.model_construct(search=settings)
        self._scheduler = RecordedAsha(config, SearchSpace((space,)), controls, [], lambda trial_id: False)
        self._space, self._trials = space, dict[int, SimpleNamespace]()

    def stops(self, suggestion: Suggestion, step: int, score: float) -> bool:
        """Whether a trial that reports a rung ends there."""
        index = suggestion.index
        if index not in self._trials:
            plan = suggestion.plan
            about = {
                "trial": index,
                "cut": plan.cut,
                "plan_bytes": self._space.plan_bytes(plan),
                **plan_to_params(plan),
            }
            self._trials[index] = SimpleNamespace(trial_id=str(index), config=about)
            self._scheduler.on_trial_add(None, self._trials[index])
        result = {METRIC: score, TIME: step}
        action: str = self._scheduler.on_trial_result(None, self._trials[index], result)
        return action == RecordedAsha.STOP


def replay(task: Task, patience: int | None = None, proposer: Proposer | None = None) -> Replay:
    """Search the table until `NUM_TRIALS` trials have ended, every plan has run, or `patience` is spent.

    With several in flight a trial's rungs are spread evenly over its duration, which is log-normal around one. A
    `proposer` stands in for the searcher that the task names.
    """
    table = Table.read(task.path)
    space = table.space(task.fraction)
    whole = SearchSpace((space,))
    method = next((name for name in BEST_FIRST if name in table.sensitivities), None)
    found = controls_of(space, table.sensitivities[method]) if task.seeded and method else []
    controls = [each for each in found if space.is_feasible(each[1])]
    plans = {plan for _, plan in controls}
    priors = table.sensitivities if task.seeded else {}
    witness = _Witness(proposer or make_proposer(task.searcher, whole, task.seed, priors))
    ledger = Ledger(whole, witness, controls, NUM_TRIALS, patience)
    asha = _Asha(table, space, plans) if task.asha else None
    generator = np.random.default_rng([task.seed, 2])
    started: list[Suggestion] = []
    ended: dict[int, EndedTrial] = {}
    spent = 0
    # (time, order of entry, suggestion, rung)
    events: list[tuple[float, int, Suggestion, int]] = []

    def fill(now: float) -> None:
        while len(started) - len(ended) < task.in_flight:
            suggestion = ledger.next()
            if suggestion is None:
                return
            started.append(suggestion)
            seconds = float(np.exp(JITTER * generator.standard_normal()))
            for rung in range(len(table.steps)):
                moment = now + seconds * (rung + 1) / len(table.steps)
                heapq.heappush(events, (moment, suggestion.index * len(table.steps) + rung, suggestion, rung))

    now = 0.0
    fill(now)
    while events:
        moment, _, suggestion, rung = heapq.heappop(events)
        index, plan, step = suggestion.index, suggestion.plan, table.steps[rung]
        if index in ended:
            continue
        now = moment
        spent += step - (table.steps[rung - 1] if rung else 0)
        score = table.measured(plan.formats, step, (task.seed, "trial"))
        ledger.observe(Observation(index, plan, step, score))
        finished = step == table.steps[-1]
        if not finished and not (asha and asha.stops(suggestion, step, score)):
            continue
        ledger.close(suggestion)
        last = table.steps[-1]
        fresh = table.measured(plan.formats, last, (task.seed, "fresh"))
        loss = table.score(plan.formats, last)
        ended[index] = EndedTrial(index, loss, score, fresh, plan in plans, finished, spent)
        fill(now)
    proposals = witness.proposed
    wasted = sum(proposals[item.index].plan != item.plan for item in started if item.index in proposals)
    at_start = [table.score(plan.formats, table.steps[-1]) for plan in plans]
    return Replay(
        task,
        list(ended.values()),
        min(at_start, default=None),
        {
            index: (proposal.expected_improvement, proposal.noise)
            for index, proposal in proposals.items()
            if proposal.expected_improvement is not None and proposal.noise is not None
        },
        len(proposals),
        wasted,
        witness.seconds / max(1, len(proposals)),
        now,
    )
