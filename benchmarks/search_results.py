"""What replays say: regret of the plan that is returned, rows over seeds, goals, and what sensitivities are worth."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr
from search_replay import NUM_TRIALS, Replay, Table

from qpruner.search.choice import seed_plan

FRACTIONS = (0.5, 0.25, 0.75)
"""Budgets, the middle one first."""
IN_FLIGHT = 16
MILESTONES = (8, 16, 32, 64)
PATIENCES = (3, 8, 16)
NEVER = NUM_TRIALS + 1
"""Stands for "not within the trials" where trials are counted."""


@dataclass(frozen=True)
class Row:
    """All seeds of one searcher in one setting; every triple is lower quartile, median, upper quartile.

    Attributes:
        table: Name of the table.
        fraction: Of the budget.
        seeded: Whether seed plans and sensitivities were given.
        in_flight: Trials at a time.
        searcher: Its name.
        seeds: How many replays.
        regret: Trials -> simple regret of the plan that the search would return then, as a share of the range.
        tried: Trials -> the same of the best plan among those tried, which only an oracle knows where scores are noisy.
        to_5_percent: Trials from which on the regret was at most 5 %; `NEVER` stands for none.
        to_1_percent: The same at 1 %.
        area: Mean regret over all trials.
        ends_best: Share of replays that returned the best plan.
        worse_than_seed: Share of replays that returned a plan worse than the best control; None when blind.
        wasted: Share of proposals that had to be repaired.
        seconds: Processor time of a proposal, median.
        curves: Trials -> quartiles, for the plot.
    """

    table: str
    fraction: float
    seeded: bool
    in_flight: int
    searcher: str
    seeds: int
    regret: dict[int, tuple[float, ...]]
    tried: dict[int, tuple[float, ...]]
    to_5_percent: tuple[float, ...]
    to_1_percent: tuple[float, ...]
    area: tuple[float, ...]
    ends_best: float
    worse_than_seed: float | None
    wasted: float
    seconds: float
    curves: np.ndarray


class Limits:
    """Losses of the best and the worst plan inside a budget.

    Of a surrogate the best plan is not known for certain: a replay may have found a better one.
    """

    def __init__(self, replays: Iterable[Replay]) -> None:
        self._lowest: dict[tuple[Path, float], float] = {}
        self._found: dict[tuple[Path, float], tuple[float, float]] = {}
        for item in replays:
            place = item.task.path, item.task.fraction
            losses = [trial.loss for trial in item.trials]
            self._lowest[place] = min(self._lowest.get(place, math.inf), *losses)

    def of(self, path: Path, fraction: float) -> tuple[float, float]:
        place = path, fraction
        if place not in self._found:
            table = Table.read(path)
            best, worst = table.limits(table.space(fraction))
            self._found[place] = min(best, self._lowest[place]), worst
        return self._found[place]

    def regrets(self, item: Replay, losses: Sequence[float] | np.ndarray) -> np.ndarray:
        """Losses as shares of the range; no plan counts as the worst."""
        best, worst = self.of(item.task.path, item.task.fraction)
        return (np.minimum(losses, worst) - best) / ((worst - best) or 1.0)


class Setting(NamedTuple):
    """What replays have in common that differ by their seed alone."""

    path: Path
    fraction: float
    seeded: bool
    in_flight: int
    searcher: str

    @property
    def columns(self) -> dict[str, Any]:
        """As the tables name it."""
        named = self._asdict()
        return {"table": named.pop("path").stem} | named


def settings_of(replays: Iterable[Replay]) -> list[tuple[Setting, list[Replay]]]:
    """Replays by setting."""
    groups: dict[Setting, list[Replay]] = {}
    for item in replays:
        task = item.task
        setting = Setting(task.path, task.fraction, task.seeded, task.in_flight, task.searcher)
        groups.setdefault(setting, []).append(item)
    return sorted(groups.items(), key=lambda entry: str(entry[0]))


def summarize(replays: Sequence[Replay]) -> list[Row]:
    """One row for every setting without ASHA."""
    limits = Limits(replays)
    rows = []
    for setting, items in settings_of(item for item in replays if not item.task.asha):
        regrets = np.array([_padded(limits.regrets(item, item.returned())) for item in items])
        tried = np.array(
            [
                _padded(limits.regrets(item, np.minimum.accumulate([trial.loss for trial in item.trials])))
                for item in items
            ]
        )
        ended = regrets[:, -1]
        seeds_at = [float(limits.regrets(item, [item.best_seed])[0]) for item in items if item.best_seed is not None]
        rows.append(
            Row(
                **setting.columns,
                seeds=len(items),
                regret={number: quartiles(regrets[:, number - 1]) for number in MILESTONES},
                tried={number: quartiles(tried[:, number - 1]) for number in MILESTONES},
                to_5_percent=quartiles(_trials_to(regrets, 0.05)),
                to_1_percent=quartiles(_trials_to(regrets, 0.01)),
                area=quartiles(regrets.mean(axis=1)),
                ends_best=float(np.mean(ended <= 1e-9)),
                worse_than_seed=float(np.mean(ended > np.array(seeds_at) + 1e-9)) if seeds_at else None,
                wasted=sum(item.wasted for item in items) / max(1, sum(item.proposals for item in items)),
                seconds=float(np.median([item.seconds for item in items])),
                curves=np.quantile(regrets, (0.25, 0.5, 0.75), axis=0),
            )
        )
    return rows


def _padded(regrets: np.ndarray) -> np.ndarray:
    """Regret after each of `NUM_TRIALS` trials; where plans ran out, the last value stays."""
    return np.concatenate([regrets, np.full(NUM_TRIALS - len(regrets), regrets[-1])])


def _trials_to(regrets: np.ndarray, share: float) -> np.ndarray:
    """Trials from which on the regret is at most `share`, of each row."""
    stays = np.flip(np.logical_and.accumulate(np.flip(regrets <= share + 1e-12, axis=1), axis=1), axis=1)
    return np.where(stays.any(axis=1), stays.argmax(axis=1) + 1, NEVER)


def quartiles(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """Lower quartile, median, upper quartile."""
    # No interpolation: a count of trials stays one, and NEVER is not averaged with a count.
    return tuple(float(value) for value in np.quantile(values, (0.25, 0.5, 0.75), method="inverted_cdf"))


def asha_against_full(replays: Sequence[Replay]) -> list[dict[str, Any]]:
    """What ASHA saves: the same searches with and without it, by steps in units of a full trial's.

    Only settings that were replayed with ASHA; steps of all trials count, those of stopped ones too.
    """
    limits = Limits(replays)
    both = {asha: dict(settings_of(item for item in replays if item.task.asha == asha)) for asha in (True, False)}
    found = []
    for setting, asha in itertools.product(both[True], (False, True)):
        items = both[asha].get(setting, [])
        if not items:
            continue
        full = Table.read(setting.path).steps[-1]
        regrets = [limits.regrets(item, item.returned()) for item in items]
        spent = [np.array([trial.spent for trial in item.trials]) / full for item in items]
        found.append(
            {
                **setting.columns,
                "asha": asha,
                "seeds": len(items),
                "to_5_percent": quartiles([_spent_to(*pair, 0.05) for pair in zip(regrets, spent, strict=True)]),
                "to_1_percent": quartiles([_spent_to(*pair, 0.01) for pair in zip(regrets, spent, strict=True)]),
                "at_end": quartiles([regret[-1] for regret in regrets]),
                "spent": quartiles([each[-1] for each in spent]),
                "trials": quartiles([len(item.trials) for item in items]),
                "stopped": float(np.mean([not trial.finished for item in items for trial in item.trials])),
            }
        )
    return found


def _spent_to(regret: np.ndarray, spent: np.ndarray, share: float) -> float:
    """Steps after which the regret stays at most `share`; infinite where it does not."""
    number = int(_trials_to(regret[None], share)[0])
    return math.inf if number == NEVER else float(spent[number - 1])


def patience_of(replays: Sequence[Replay]) -> list[dict[str, Any]]:
    """What `search.patience` saves and costs, for searchers that expect an improvement, at the middle budget."""
    limits = Limits(replays)
    found = []
    for setting, items in settings_of(
        item for item in replays if item.promises and not item.task.asha and item.task.fraction == FRACTIONS[0]
    ):
        for patience in PATIENCES:
            ended = [item.with_patience(patience) for item in items]
            found.append(
                {
                    **setting.columns,
                    "patience": patience,
                    "seeds": len(items),
                    "trials": quartiles([len(item.trials) for item in ended]),
                    "regret": quartiles([float(limits.regrets(item, item.returned())[-1]) for item in ended]),
                    "without": quartiles([float(limits.regrets(item, item.returned())[-1]) for item in items]),
                }
            )
    return found


def goals_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The goals of the search at the middle budget, each with the numbers it is judged by.

    Where a regret of 5 or 1 % is not reached within the trials, how soon another's regret is reached says more. With
    several in flight "1.5 times the sequential run's" can mean its trials, or those beyond the first 16: both are told.
    """
    found = []
    for table in sorted({row.table for row in rows}):
        at = {
            (row.seeded, row.in_flight, row.searcher): row
            for row in rows
            if row.table == table and row.fraction == FRACTIONS[0]
        }
        if (False, 1, "gp") not in at:
            continue
        for rival, factor in (("hyperopt", 2), ("bayesopt", 2), ("random", 3)):
            if (False, 1, rival) in at:
                ours, theirs = (at[False, 1, name] for name in ("gp", rival))
                name = f"blind, trials to 5 % at most 1/{factor} of {rival}"
                found.append(_goal(table, name, ours.to_5_percent[1], theirs.to_5_percent[1] / factor))
                if theirs.to_5_percent[1] == NEVER:
                    name = f"blind, trials to the last regret of {rival} at most 1/{factor} of its"
                    found.append(_goal(table, name, _reaches(ours, theirs, NUM_TRIALS), NUM_TRIALS / factor))
            if (True, 1, rival) in at:
                ours, theirs = (at[True, 1, name] for name in ("gp", rival))
                found.append(_goal(table, f"seeded, area at most 1/2 of {rival}", ours.area[1], theirs.area[1] / 2))
        gps = [row for row in rows if row.table == table and row.searcher == "gp"]
        found.append(_goal(table, "seeded, does not end on the best", 1 - at[True, 1, "gp"].ends_best, 0.2))
        worse = max(row.worse_than_seed for row in gps if row.worse_than_seed is not None)
        found.append(_goal(table, "ends worse than the best seed", worse, 0.0))
        found.append(_goal(table, "wasted proposals", max(row.wasted for row in gps), 0.0))
        for seeded, share in itertools.product((False, True), (5, 1)):
            one, many = (getattr(at[seeded, number, "gp"], f"to_{share}_percent")[1] for number in (1, IN_FLIGHT))
            name = f"{'seeded' if seeded else 'blind'}, {IN_FLIGHT} in flight, trials beyond {IN_FLIGHT} to {share} %"
            if one == NEVER:
                one = NUM_TRIALS // 2
                many = _reaches(at[seeded, IN_FLIGHT, "gp"], at[seeded, 1, "gp"], one)
                name = name.replace(f"{share} %", f"the regret after {one} one at a time")
            beyond = max(0, many - IN_FLIGHT)
            found.append(_goal(table, f"{name}, by all trials one at a time", beyond, 1.5 * one))
            found.append(_goal(table, f"{name}, by those beyond {IN_FLIGHT}", beyond, 1.5 * max(0, one - IN_FLIGHT)))
    return list({(goal["table"], goal["goal"]): goal for goal in found}.values())


def _reaches(row: Row, other: Row, trials: int) -> int:
    """Trials until the median regret of a row is that of another after so many trials."""
    reached = row.curves[1] <= other.curves[1][trials - 1] + 1e-12
    return int(reached.argmax()) + 1 if reached.any() else NEVER


def _goal(table: str, goal: str, value: float, limit: float) -> dict[str, Any]:
    return {"table": table, "goal": goal, "value": value, "limit": limit, "met": bool(value <= limit + 1e-12)}


def ablation(path: Path) -> list[dict[str, Any]]:
    """What each sensitivity is worth: rank correlation with the measured effects, the seed plan's place, its cost.

    A measured effect is a level's, of a group, over the highest level: the least-squares main effect of a table, the
    coefficient of a surrogate.
    """
    table = Table.read(path)
    space = table.space(FRACTIONS[0])
    before, after = (0, table.steps[-1]) if table.is_surrogate else (min(table.losses), table.steps[-1])
    best, worst = table.limits(space)
    inside = [] if table.is_surrogate else sorted(table.score(plan.formats, after) for plan in table.feasible(space))
    costs: Mapping[str, float] = table.content.get("meta", {}).get("sensitivity_seconds", {})
    found = []
    for method, values in table.sensitivities.items():
        top = np.array(values.get(table.levels[-1], np.zeros(len(space.groups))))
        predicted = np.concatenate([np.array(values[level]) - top for level in table.levels[:-1]])
        loss = table.score(seed_plan(values, space).formats, after)
        found.append(
            {
                "table": table.name,
                "sensitivity": method,
                "spearman": {
                    step: float(spearmanr(predicted, main_effects(table, step)).statistic)
                    for step in dict.fromkeys((before, after))
                },
                "seed_rank": int(np.searchsorted(inside, loss - 1e-12)) + 1 if inside else None,
                "num_plans": len(inside) or None,
                "seed_regret": (loss - best) / ((worst - best) or 1.0),
                "seconds": costs.get(method),
            }
        )
    return found


def main_effects(table: Table, step: int) -> np.ndarray:
    """Least-squares rise of the loss for every (level below the highest, group), ``((levels - 1) * groups,)``."""
    below = table.levels[:-1]
    if table.is_surrogate:
        main = table.content["main"]
        return np.concatenate([np.array(main[level]) - main[table.levels[-1]] for level in below])
    plans = np.array(list(table.losses[step]))
    design = np.hstack([np.ones((len(plans), 1)), *((plans == level).astype(float) for level in below)])
    effects: np.ndarray = np.linalg.lstsq(design, np.array(list(table.losses[step].values())), rcond=None)[0][1:]
    return effects
