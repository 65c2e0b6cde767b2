"""Replay searches on measured tables: how fast each searcher finds the best plan.

No model runs. It also measures what ASHA costs. Without `--table` it reads every file in
benchmarks/tables. Budgets are in MB:

    .venv/bin/python benchmarks/search_regret.py
    .venv/bin/python benchmarks/search_regret.py --table FILE --budgets 75 90 --seeds 5

Every searcher gets the controls of a run first; `gp` is given the sensitivities too, which the
others cannot use (`--blind`: neither). Regret is the loss of the plan that a run would return after
so many trials, above that of the best plan that fits, in nats and without noise: medians over
seeds, of which the worst is in brackets. Trials count in the order in which they end. Tables of
several rungs are searched with ASHA, by `gp` also without. Prints tables, then one JSON line.
"""

import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import command_line, fresh_processes
from search_replay import Replay, Table, Task, agreement, replay

from qpruner.search import choice

TABLES = Path(__file__).resolve().parent / "tables"
SEARCHERS = ("gp", "hyperopt", "bayesopt", "random")
MOST_GROUPS = {"bayesopt": 40}  # above so many groups a proposal takes it minutes
GOAL = 0.02  # nats
STEP = 5_000_000  # bytes between the budgets of `knapsacks`
GOAL_TRIALS = 16  # after which the goal counts
FRACTIONS = (0.25, 0.5, 0.75)
"""Budgets by default: so far from the smallest plan's bytes to the largest's."""


def budgets_of(table: Table, megabytes: Sequence[float], flops_fraction: float) -> list[int]:
    """Return the budgets in bytes in which a plan fits."""
    spaces = [table.space_of(cut, 0) for cut in table.cuts if table.may_win(cut, flops_fraction)]
    smallest = min(space.plan_bytes(space.smallest()) for space in spaces)
    largest = max(space.plan_bytes(space.uniform(space.levels[-1])) for space in spaces)
    asked = [round(each * 1e6) for each in megabytes]
    budgets = asked or [round(smallest + fraction * (largest - smallest)) for fraction in FRACTIONS]
    return [budget for budget in budgets if budget >= smallest]


def replays(tasks: Sequence[Task], jobs: int) -> Iterator[Replay]:
    """Replay all tasks, in their order."""
    torch.set_num_threads(1)
    if jobs == 1:
        yield from map(replay, tasks)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with fresh_processes(jobs, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(replay, tasks)


def at_or_below(regrets: Sequence[float], limit: float) -> float:
    """Count the trials from which on the regret stays at or below a limit; infinite if it never
    does."""
    above = [number for number, regret in enumerate(regrets, start=1) if regret > limit + 1e-9]
    needed = above[-1] + 1 if above else 1
    return needed if needed <= len(regrets) else math.inf


def after(found: Replay, number: int) -> float:
    """Return the regret after so many trials; where plans ran out, after all."""
    regrets = found.regrets()
    return regrets[min(number, len(regrets)) - 1]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Show the median and the worst."""
    return f"{statistics.median_high(values):{form}} [{max(values):{form}}]"


def regret_row(found: Sequence[Replay], ours: Sequence[Replay]) -> dict[str, Any]:
    """Describe the replays of one searcher beside those of `gp`."""
    regrets = [each.regrets() for each in found]
    num_controls = [sum(trial.control for trial in each.trials) for each in found]
    limits = [after(each, GOAL_TRIALS) for each in ours]
    num_at_goal = sum(after(each, GOAL_TRIALS) <= GOAL for each in found)
    return {
        "searcher": found[0].task.searcher,
        "controls": statistics.median_high(num_controls),
        "after them": spread(
            [after(each, max(1, count)) for each, count in zip(found, num_controls, strict=True)]
        ),
        **{
            f"after {number}": spread([after(each, number) for each in found])
            for number in (8, GOAL_TRIALS, 32)
        },
        f"<= {GOAL} after {GOAL_TRIALS}": f"{num_at_goal} of {len(found)}",
        f"trials to {GOAL}": spread([at_or_below(each, GOAL) for each in regrets], ".0f"),
        f"to gp's after {GOAL_TRIALS}": spread(
            [at_or_below(*each) for each in zip(regrets, limits, strict=True)], ".0f"
        ),
        "to the best": spread([at_or_below(each, 0.0) for each in regrets], ".0f"),
        "repaired": sum(each.repaired for each in found),
    }


def asha_row(stopping: Sequence[Replay], full: Sequence[Replay], number: int) -> dict[str, Any]:
    """Describe what ASHA did in the first trials of searches, beside the same ones without it."""
    own = list[float]()
    stopped = list[float]()
    spent = list[float]()
    apart = list[float]()
    same = 0
    alike = 0
    full_steps = Table.read(stopping[0].task.path).steps[-1]
    for each, other in zip(stopping, full, strict=True):
        trials = each.trials[:number]
        ends = [trial for trial in trials if not trial.finished]
        searched = [trial for trial in trials if not trial.control]
        own.append(len(ends) / max(1, len(searched)))
        stopped.append(len(ends) / len(trials))
        spent.append(trials[-1].spent / full_steps / len(trials))
        winner = each.returned(number)
        ideal = each.returned(number, as_if_finished=True)
        elsewhere = other.returned(number)
        assert winner and ideal and elsewhere
        same += winner.plan == ideal.plan
        alike += winner.plan == elsewhere.plan
        best_stopped = min((trial.loss for trial in ends if trial.fits), default=math.inf)
        apart.append(best_stopped - winner.loss)
    return {
        "trials": number,
        "stopped": f"{statistics.fmean(stopped):.0%}",
        "of those proposed": f"{statistics.fmean(own):.0%}",
        "steps spent": f"{statistics.fmean(spent):.0%}",
        "winner if none is stopped": f"same in {same} of {len(stopping)}",
        "without ASHA": f"same in {alike}",
        "best stopped - winner": f"{statistics.median(apart):+.3f} [{min(apart):+.3f}]",
        "regret": spread([after(each, number) for each in stopping]),
        "regret without": spread([after(each, number) for each in full]),
    }


def print_aligned(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of the same columns."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def about(table: Table, task: Task) -> dict[str, Any]:
    """Describe the plans inside a budget: how many, the best of each cut, and how well rungs rank
    them."""
    space = table.space(task.budget, task.flops_fraction)
    inside = [plan for plan in table.plans if space.is_feasible(plan)]
    best = {
        cut: min((table.loss(plan) for plan in inside if plan.cut == cut), default=math.nan)
        for cut in space.cuts
    }
    controls = [
        plan
        for _, plan in table.controls(task.budget, task.flops_fraction)
        if space.is_feasible(plan)
    ]
    return {
        "table": table.name,
        "MB": f"{task.budget / 1e6:.1f}",
        "plans": len(inside) or "many",
        "best by cut": ", ".join(f"{cut} {loss:.3f}" for cut, loss in best.items()),
        "best control": f"{min(map(table.loss, controls), default=math.nan):.3f}",
        "noise": table.content["loss_noise"],
        "Kendall's tau of rungs": ", ".join(
            f"{each.step}: {each.within} within, {each.across} across"
            for each in agreement(table, space)
        )
        or "-",
    }


def knapsacks(table: Table) -> Iterator[dict[str, Any]]:
    """Describe each cut's knapsacks: by each sensitivity their regret among the cut's plans, in
    budgets 5 MB apart."""
    for cut in table.cuts if table.plans else ():
        sizes = [table.space_of(cut, 0).plan_bytes(plan) for plan in table.plans if plan.cut == cut]
        spaces = [
            table.space_of(cut, budget)
            for budget in range(STEP * -(-min(sizes) // STEP), max(sizes), STEP)
        ]
        if not spaces:  # all plans of this cut are within 5 MB of each other
            continue
        best = [
            min(table.loss(plan) for plan in table.plans if space.is_feasible(plan))
            for space in spaces
        ]
        row: dict[str, Any] = {"table": table.name, "cut": cut, "budgets": len(spaces)}
        for method, values in table.content["sensitivities"].items():
            losses = [table.loss(choice.seed_plan(values, space)) for space in spaces]
            row[method] = spread([one - least for one, least in zip(losses, best, strict=True)])
        yield row


def main() -> None:
    """Replay, then tell."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--table", type=Path, action="append", help=f"repeatable; default: every file in {TABLES}"
    )
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[], help="in MB; default: three of each table"
    )
    parser.add_argument("--flops-fraction", type=float, default=1.0)
    parser.add_argument("--searchers", nargs="+", choices=SEARCHERS, default=SEARCHERS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    shown = {name: list[dict[str, Any]]() for name in ("tables", "knapsacks", "regret", "asha")}
    for path in asked.table or sorted(TABLES.glob("*.json")):
        table = Table.read(path)
        shown["knapsacks"] += knapsacks(table)
        for budget in budgets_of(table, asked.budgets, asked.flops_fraction):
            first = Task(
                path=path,
                budget=budget,
                searcher="gp",
                seed=0,
                trials=asked.trials,
                in_flight=asked.in_flight,
                flops_fraction=asked.flops_fraction,
                blind=asked.blind,
            )
            shown["tables"].append(about(table, first))
            where = {"table": table.name, "MB": f"{budget / 1e6:.1f}"}
            ours = list[Replay]()
            for name in asked.searchers:
                if len(table.content["groups"]) > MOST_GROUPS.get(name, math.inf):
                    continue
                tasks = [replace(first, searcher=name, seed=seed) for seed in range(asked.seeds)]
                found = list(replays(tasks, asked.jobs))
                ours = ours or found
                shown["regret"].append(where | regret_row(found, ours))
                if name == "gp" and len(table.steps) > 1:
                    full = list(replays([replace(task, asha=False) for task in tasks], asked.jobs))
                    shown["asha"] += [
                        where | asha_row(found, full, number)
                        for number in (GOAL_TRIALS, asked.trials)
                    ]
                print(f"{table.name}, {budget / 1e6:.1f} MB, {name}", file=sys.stderr, flush=True)
    for name, rows in shown.items():
        if rows:
            print(f"\n{name}")
            print_aligned(rows)
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
