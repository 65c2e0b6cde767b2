"""Which searcher finds the best plan in the fewest trials? Replays on measured losses; no model is run.

    .venv/bin/python benchmarks/search_regret.py                        # every file in benchmarks/tables
    .venv/bin/python benchmarks/search_regret.py --table FILE --seeds 5  # one of your own, fewer seeds

Every searcher, blind (no seed plans, no sensitivities) and seeded (the same seed plans first; `gp` is given the
sensitivities, which the others cannot use), one trial at a time and 16 in flight; at the middle budget with `--seeds`
seeds, at a small and a large one with a third of them. `hyperopt` and `bayesopt` take a second and more for a proposal
where groups are many: above 40 groups they get a fifth and a fifteenth of the seeds. With `--keep FILE` every replay
goes there as it ends, and replays that are there are not done again (remove those of a searcher that has changed); with
`--stored` nothing is replayed at all, and the table says how many seeds each row has.

Regret is the loss above that of the best plan inside the budget, as a share of the range from the best to the worst.
Trials count in the order in which they end. A table's losses are replayed as measured: trials share their seed, so a
repeat has no noise. A surrogate's have what its fit leaves unexplained added, and regret is without it. Prints a table,
the ablation of the sensitivities, the goals, then one JSON line; draws regret against trials.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from search_replay import NUM_TRIALS, Replay, Table, Task, controls_of, replay

from qpruner.sensitivity.seeds import seed_origin

TABLES = Path(__file__).resolve().parent / "tables"
SEARCHERS = ("gp", "hyperopt", "bayesopt", "random")
FRACTIONS = (0.5, 0.25, 0.75)
"""Budgets, the middle one first."""
IN_FLIGHT = 16
MILESTONES = (8, 16, 32, 64)
MANY_GROUPS, SHARES = 40, {"hyperopt": 5, "bayesopt": 15}
"""Above so many groups these searchers are slow, and get one seed in so many."""
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
        regret: Trials -> simple regret, as a share of the range.
        to_5_percent: Trials until the regret was at most 5 %; `NEVER` stands for none.
        to_1_percent: The same at 1 %.
        area: Mean regret over all trials.
        ends_best: Share of replays that ended on the best plan.
        worse_than_seed: Share of replays that ended above the best seed plan; None when blind.
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
    to_5_percent: tuple[float, ...]
    to_1_percent: tuple[float, ...]
    area: tuple[float, ...]
    ends_best: float
    worse_than_seed: float | None
    wasted: float
    seconds: float
    curves: np.ndarray


def tasks_of(paths: Sequence[Path], searchers: Sequence[str], seeds: int) -> list[Task]:
    """The longest ones first, so that no worker is left with them alone."""
    tasks = []
    for path, fraction, searcher, seeded, in_flight in itertools.product(
        paths, FRACTIONS, searchers, (False, True), (1, IN_FLIGHT)
    ):
        many = len(Table.read(path).content["groups"]) > MANY_GROUPS
        number = math.ceil(seeds / SHARES.get(searcher, 1)) if many else seeds
        number = number if fraction == FRACTIONS[0] else math.ceil(number / 3)
        tasks += [Task(path, fraction, searcher, seeded, in_flight, seed) for seed in range(number)]
    return sorted(tasks, key=lambda task: SEARCHERS.index(task.searcher) != SEARCHERS.index("bayesopt"))


def stored(keep: Path | None) -> dict[Task, Replay]:
    """The replays that a file holds."""
    lines = keep.read_text().splitlines() if keep and keep.exists() else []
    return {item.task: item for item in map(Replay.from_json, lines)}


def replay_all(tasks: Sequence[Task], jobs: int, keep: Path | None) -> list[Replay]:
    """Every task's replay, from `keep` where it is there."""
    found = stored(keep)
    todo = [task for task in tasks if task not in found]
    for number, item in enumerate(_replays(todo, jobs), start=1):
        found[item.task] = item
        if keep:
            with keep.open("a") as file:
                file.write(item.to_json() + "\n")
        print(f"\r{number} of {len(todo)} replays", end="", file=sys.stderr, flush=True)
    return [found[task] for task in tasks]


def _replays(tasks: Sequence[Task], jobs: int) -> Iterator[Replay]:
    torch.set_num_threads(1)
    if jobs == 1:
        yield from map(replay, tasks)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(replay, task) for task in tasks]):
            yield future.result()


def summarize(replays: Iterable[Replay]) -> list[Row]:
    """One row for every setting."""
    groups: dict[tuple[Path, float, bool, int, str], list[Replay]] = {}
    lowest: dict[tuple[Path, float], float] = {}
    for item in replays:
        task = item.task
        groups.setdefault((task.path, task.fraction, task.seeded, task.in_flight, task.searcher), []).append(item)
        place = task.path, task.fraction
        lowest[place] = min(lowest.get(place, math.inf), *item.losses)
    rows = []
    limits: dict[tuple[Path, float], tuple[float, float]] = {}
    for (path, fraction, seeded, in_flight, searcher), items in sorted(groups.items(), key=lambda entry: str(entry[0])):
        table = Table.read(path)
        if (path, fraction) not in limits:
            best, worst = table.limits(table.space(fraction))
            # Of a surrogate the best plan is not known for certain: a replay may have found a better one.
            limits[path, fraction] = min(best, lowest[path, fraction]), worst
        best, worst = limits[path, fraction]
        regrets = np.array([_curve(item.losses, best, worst) for item in items])
        ended = regrets[:, -1]
        seeds_at = [(item.best_seed - best) / (worst - best) for item in items if item.best_seed is not None]
        rows.append(
            Row(
                table=table.name,
                fraction=fraction,
                seeded=seeded,
                in_flight=in_flight,
                searcher=searcher,
                seeds=len(items),
                regret={number: _quartiles(regrets[:, number - 1]) for number in MILESTONES},
                to_5_percent=_quartiles(_trials_to(regrets, 0.05)),
                to_1_percent=_quartiles(_trials_to(regrets, 0.01)),
                area=_quartiles(regrets.mean(axis=1)),
                ends_best=float(np.mean(ended <= 1e-9)),
                worse_than_seed=float(np.mean(ended > np.array(seeds_at) + 1e-9)) if seeds_at else None,
                wasted=sum(item.wasted for item in items) / max(1, sum(item.proposals for item in items)),
                seconds=float(np.median([item.seconds for item in items])),
                curves=np.quantile(regrets, (0.25, 0.5, 0.75), axis=0),
            )
        )
    return rows


def _curve(losses: Sequence[float], best: float, worst: float) -> np.ndarray:
    """Regret after each of `NUM_TRIALS` trials; where plans ran out, the last value stays."""
    found = np.minimum.accumulate(losses)
    padded = np.concatenate([found, np.full(NUM_TRIALS - len(found), found[-1])])
    return (padded - best) / (worst - best)


def _trials_to(regrets: np.ndarray, share: float) -> np.ndarray:
    reached = regrets <= share + 1e-12
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, NEVER)


def _quartiles(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    # No interpolation: a count of trials stays one, and NEVER is not averaged with a count.
    return tuple(float(value) for value in np.quantile(values, (0.25, 0.5, 0.75), method="inverted_cdf"))


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
    seeds = dict(controls_of(table, space))
    before, after = (0, table.steps[-1]) if table.is_surrogate else (min(table.losses), table.steps[-1])
    best, worst = table.limits(space)
    inside = [] if table.is_surrogate else sorted(table.score(plan.bits, after) for plan in table.feasible(space))
    costs: Mapping[str, float] = table.content["meta"].get("sensitivity_seconds", {})
    found = []
    for method, values in table.sensitivities.items():
        top = np.array(values.get(table.levels[-1], np.zeros(len(space.groups))))
        predicted = np.concatenate([np.array(values[bits]) - top for bits in table.levels[:-1]])
        loss = table.score(seeds[seed_origin(method)].bits, after)
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
                "seed_regret": (loss - best) / (worst - best),
                "seconds": costs.get(method),
            }
        )
    return found


def main_effects(table: Table, step: int) -> np.ndarray:
    """Least-squares rise of the loss for every (level below the highest, group), ``((levels - 1) * groups,)``."""
    below = table.levels[:-1]
    if table.is_surrogate:
        main = table.content["main"]
        return np.concatenate([np.array(main[str(bits)]) - main[str(table.levels[-1])] for bits in below])
    plans = np.array(list(table.losses[step]))
    design = np.hstack([np.ones((len(plans), 1)), *((plans == bits).astype(float) for bits in below)])
    effects: np.ndarray = np.linalg.lstsq(design, np.array(list(table.losses[step].values())), rcond=None)[0][1:]
    return effects


def random_design(path: Path) -> dict[int, tuple[float, ...]]:
    """What random plans can tell of a surrogate of two levels at the middle budget, to one who knows its prior.

    Number of plans -> quartiles of the regret of the plan that ridge regression on them picks, given the true variance
    of the effects and their true mean a byte.
    """
    table = Table.read(path)
    space = table.space(FRACTIONS[0])
    best, worst = table.limits(space)
    low, high = (np.array(table.content["main"][str(level)]) for level in table.levels)
    effects, noise = high - low, float(table.content["loss_noise"])
    sizes = np.diff(np.array(space.group_bytes), axis=1)[:, 0]
    room = space.budget_bytes - space.fixed_bytes - sum(group[0] for group in space.group_bytes)
    mean = sizes * effects.sum() / sizes.sum()
    variance = float(np.mean((effects - mean) ** 2))

    def regret(number: int, seed: int) -> float:
        generator = np.random.default_rng(seed)
        design = np.zeros((number, len(sizes)))
        for row in design:
            for group in generator.permutation(len(sizes)):
                row[group] = row @ sizes + sizes[group] <= room
        scores = design @ effects + noise * generator.standard_normal(number)
        design, scores = design - design.mean(0), scores - scores.mean()
        gram = variance * design @ design.T + noise**2 * np.eye(number)
        found = mean + variance * design.T @ np.linalg.solve(gram, scores - design @ mean)
        plan = space.best_by_gain([[0.0, -effect] for effect in found])
        return (table.score(plan.bits, 0) - best) / (worst - best)

    return {number: _quartiles([regret(number, seed) for seed in range(12)]) for number in (32, 64, 128, 256)}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Regret against trials at the middle budget, one at a time: median and quartiles, a panel a table and start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.fraction == FRACTIONS[0] and row.in_flight == 1]
    tables = sorted({row.table for row in shown})
    figure, panels = pyplot.subplots(
        len(tables), 2, figsize=(11, 3.4 * len(tables)), squeeze=False, sharex=True, layout="constrained"
    )
    for (line, table), seeded in itertools.product(enumerate(tables), (False, True)):
        panel = panels[line, int(seeded)]
        for row in (row for row in shown if row.table == table and row.seeded == seeded):
            color = f"C{SEARCHERS.index(row.searcher)}"
            trials = np.arange(1, NUM_TRIALS + 1)
            panel.plot(trials, row.curves[1], color=color, label=row.searcher)
            panel.fill_between(trials, row.curves[0], row.curves[2], color=color, alpha=0.15, linewidth=0)
        panel.set_yscale("symlog", linthresh=0.01)
        panel.set_ylim(bottom=0)
        panel.set_title(f"{table}, {'seeded' if seeded else 'blind'}", fontsize=9)
        panel.set_xlabel("trials")
        panel.set_ylabel("regret, share of the range")
        panel.grid(alpha=0.3)
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    panels[0, 0].legend(lines.values(), lines.keys())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def show(rows: Sequence[Row], ablations: Sequence[Mapping[str, Any]], goals: Sequence[Mapping[str, Any]]) -> None:
    """Everything as text: medians, quartiles in brackets."""

    def spread(values: Sequence[float], form: str) -> str:
        # The quartiles are ordered; the median is the middle one.
        texts = ["never" if form == ".0f" and value >= NEVER else format(value, form) for value in values]
        return f"{texts[1]} [{texts[0]}-{texts[2]}]"

    print("regret in % of the range, median [quartiles]")
    header = ["table", "budget", "start", "in flight", "searcher", "seeds", *(f"after {n}" for n in MILESTONES)]
    lines = [[*header, "to 5 %", "to 1 %", "area", "ends best", "wasted", "s each"]]
    for row in rows:
        setting = [
            row.table,
            f"{row.fraction:g}",
            "seeded" if row.seeded else "blind",
            str(row.in_flight),
            row.searcher,
        ]
        regrets = [spread([100 * value for value in row.regret[number]], ".1f") for number in MILESTONES]
        counts = [spread(row.to_5_percent, ".0f"), spread(row.to_1_percent, ".0f")]
        area = spread([100 * value for value in row.area], ".1f")
        shares = [f"{row.ends_best:.0%}", f"{row.wasted:.0%}"]
        lines.append([*setting, str(row.seeds), *regrets, *counts, area, *shares, f"{row.seconds:.3f}"])
    _print_aligned(lines)
    lines = [["table", "sensitivity", "Spearman by step", "seed's rank", "seed's regret", "seconds"]]
    for found in ablations:
        correlations = ", ".join(f"{step}: {value:.2f}" for step, value in found["spearman"].items())
        rank = f"{found['seed_rank']} of {found['num_plans']}" if found["seed_rank"] else "-"
        seconds = "-" if found["seconds"] is None else f"{found['seconds']:.1f}"
        lines.append([found["table"], found["sensitivity"], correlations, rank, f"{found['seed_regret']:.1%}", seconds])
    print()
    _print_aligned(lines)
    lines = [["table", "goal (middle budget)", "gp", "limit", ""]]
    for goal in goals:
        numbers = [f"{goal[key]:.3g}" for key in ("value", "limit")]
        lines.append([goal["table"], goal["goal"], *numbers, "met" if goal["met"] else "MISSED"])
    print()
    _print_aligned(lines)


def _print_aligned(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, action="append", help=f"repeatable; default: every file in {TABLES}")
    parser.add_argument("--searchers", nargs="+", choices=SEARCHERS, default=SEARCHERS)
    parser.add_argument("--seeds", type=int, default=30, help="at the middle budget; a third at the others")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="file of replays, a line each, to go on from")
    parser.add_argument("--stored", action="store_true", help="only tell what the file of `--keep` holds")
    parser.add_argument("--plot", type=Path, default=Path("search_regret.png"))
    arguments = parser.parse_args()
    paths = arguments.table or sorted(TABLES.glob("*.json"))
    tasks = tasks_of(paths, arguments.searchers, arguments.seeds)
    if arguments.stored:
        held = stored(arguments.keep)
        tasks = [task for task in tasks if task in held]
    rows = summarize(replay_all(tasks, arguments.jobs, arguments.keep))
    ablations = [found for path in paths for found in ablation(path)]
    goals = goals_of(rows)
    show(rows, ablations, goals)
    designs = {path.stem: random_design(path) for path in paths if Table.read(path).is_surrogate}
    for name, regrets in designs.items():
        told = ", ".join(f"{values[1]:.1%} ({number})" for number, values in regrets.items())
        print(f"\n{name}: regret of ridge regression with the true prior on random plans, median: {told}")
    draw(rows, arguments.plot)
    plain = [{key: value for key, value in asdict(row).items() if key != "curves"} for row in rows]
    print(
        json.dumps(
            {
                "rows": plain,
                "ablation": ablations,
                "goals": goals,
                "random_design": designs,
                "plot": str(arguments.plot),
            }
        )
    )


if __name__ == "__main__":
    main()
