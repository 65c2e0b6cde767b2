"""Which searcher finds the best plan in the fewest trials? Replays on measured losses; no model is run.

    .venv/bin/python benchmarks/search_regret.py                        # every file in benchmarks/tables
    .venv/bin/python benchmarks/search_regret.py --table FILE --seeds 5  # one of your own, fewer seeds

Every searcher, blind (no seed plans, no sensitivities) and seeded (uniform and seed plans first, as in a run; `gp` is
given the sensitivities, which the others cannot use), one trial at a time and 16 in flight; at the middle budget with
`--seeds` seeds, at a small and a large one with a third of them. Tables with rungs are searched with ASHA besides, at
the middle budget. `bayesopt` has no rows above 40 groups, where a proposal takes it minutes. With `--keep FILE` every
replay goes there as it ends, and replays that are there are not done again (remove those of a searcher that has
changed); with `--stored` nothing is replayed at all, and the table says how many seeds each row has.

Regret is that of the plan which a run would return after so many trials: the best few by the scores it saw and the
controls are scored again, and the best there is returned (`qpruner/search/choice.py`). It is the plan's loss without
noise above that of the best plan inside the budget, as a share of the range from the best to the worst. Trials count in
the order in which they end. Scores, the first and the second, have the table's `loss_noise`, drawn anew for each seed;
a table whose trials share their training seed has none. Prints tables, the goals, then one JSON line; draws regret
against trials.
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search_informed import informed_searches, random_design
from search_replay import NUM_TRIALS, BadTable, Replay, Table, Task, replay
from search_results import (
    FRACTIONS,
    IN_FLIGHT,
    MILESTONES,
    NEVER,
    Row,
    ablation,
    asha_against_full,
    goals_of,
    patience_of,
    summarize,
)

TABLES = Path(__file__).resolve().parent / "tables"
SEARCHERS = ("gp", "hyperopt", "bayesopt", "random")
MOST_GROUPS = {"bayesopt": 40}
"""Above so many groups a searcher is not replayed: a proposal takes it minutes."""


def tasks_of(paths: Sequence[Path], searchers: Sequence[str], seeds: int) -> list[Task]:
    """The middle budget first, and seed after seed, so that what is cut off has as many seeds in every row."""
    tasks = []
    for path, fraction, searcher, seeded, in_flight in itertools.product(
        paths, FRACTIONS, searchers, (False, True), (1, IN_FLIGHT)
    ):
        table = Table.read(path)
        if len(table.content["groups"]) > MOST_GROUPS.get(searcher, math.inf):
            continue
        is_middle = fraction == FRACTIONS[0]
        schedulers = (False, True) if is_middle and len(table.steps) > 1 else (False,)
        for seed, asha in itertools.product(range(seeds if is_middle else math.ceil(seeds / 3)), schedulers):
            tasks.append(Task(path, fraction, searcher, seeded, in_flight, seed, asha))
    return sorted(tasks, key=lambda task: (FRACTIONS.index(task.fraction) > 0, task.seed))


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


def informed(path: Path) -> dict[str, Any]:
    """What a surrogate gives up to one who knows its prior: by searching, and from random plans."""
    searches = [
        {**columns_of(row), "restlessness": restlessness}
        for seeded in (False, True)
        for restlessness, row in informed_searches(Task(path, FRACTIONS[0], "informed", seeded, 1, 0)).items()
    ]
    return {"searches": searches, "random_plans": random_design(Table.read(path))}


def knows_informed(table: Table) -> bool:
    """Whether `informed` has a prior to tell: that of a surrogate of two levels."""
    return table.is_surrogate and len(table.levels) == 2


def columns_of(row: Row) -> dict[str, Any]:
    """A row as JSON has it."""
    return {key: value for key, value in asdict(row).items() if key != "curves"}


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


def show(results: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Everything as text: medians, quartiles in brackets."""

    def spread(values: Sequence[float], form: str, never: float = math.inf) -> str:
        # The quartiles are ordered; the median is the middle one.
        texts = ["never" if value >= never else format(value, form) for value in values]
        return f"{texts[1]} [{texts[0]}-{texts[2]}]"

    def percent(values: Sequence[float]) -> str:
        return spread([100 * value for value in values], ".1f")

    def setting(row: Mapping[str, Any]) -> list[str]:
        start = "seeded" if row["seeded"] else "blind"
        return [row["table"], f"{row['fraction']:g}", start, str(row["in_flight"]), row["searcher"], str(row["seeds"])]

    where = ["table", "budget", "start", "in flight", "searcher", "seeds"]
    print("regret of the plan that is returned, in % of the range, median [quartiles]")
    told = ["to 5 %", "to 1 %", "area", "ends best", "worse than seed", "wasted", "s each"]
    lines = [[*where, *(f"after {n}" for n in MILESTONES), f"best tried, {NUM_TRIALS}", *told]]
    for row in rows:
        worse = "-" if row.worse_than_seed is None else f"{row.worse_than_seed:.0%}"
        lines.append(
            [
                *setting(vars(row)),
                *(percent(row.regret[number]) for number in MILESTONES),
                percent(row.tried[NUM_TRIALS]),
            ]
            + [spread(values, ".0f", NEVER) for values in (row.to_5_percent, row.to_1_percent)]
            + [percent(row.area), f"{row.ends_best:.0%}", worse, f"{row.wasted:.0%}", f"{row.seconds:.3f}"]
        )
    _print_aligned(lines)
    if results["asha"]:
        print("\nASHA against full trials, steps in units of a full trial's")
        lines = [[*where, "ASHA", "to 5 %", "to 1 %", "spent", "trials", "stopped", "regret at the end"]]
        for row in results["asha"]:
            lines.append(
                [*setting(row), "yes" if row["asha"] else "no"]
                + [spread(row[key], ".1f") for key in ("to_5_percent", "to_1_percent", "spent")]
                + [spread(row["trials"], ".0f"), f"{row['stopped']:.0%}", percent(row["at_end"])]
            )
        _print_aligned(lines)
    if results["patience"]:
        print(f"\n`search.patience`: where it ends a search of {NUM_TRIALS} trials")
        lines = [[*where, "patience", "trials", "regret then", "without"]]
        for row in results["patience"]:
            regrets = [percent(row["regret"]), percent(row["without"])]
            lines.append([*setting(row), str(row["patience"]), spread(row["trials"], ".0f"), *regrets])
        _print_aligned(lines)
    print()
    lines = [["table", "sensitivity", "Spearman by step", "seed's rank", "seed's regret", "seconds"]]
    for found in results["ablation"]:
        correlations = ", ".join(f"{step}: {value:.2f}" for step, value in found["spearman"].items())
        rank = f"{found['seed_rank']} of {found['num_plans']}" if found["seed_rank"] else "-"
        seconds = "-" if found["seconds"] is None else f"{found['seconds']:.1f}"
        lines.append([found["table"], found["sensitivity"], correlations, rank, f"{found['seed_regret']:.1%}", seconds])
    _print_aligned(lines)
    print()
    lines = [["table", "goal (middle budget)", "gp", "limit", ""]]
    for goal in results["goals"]:
        numbers = [f"{goal[key]:.3g}" for key in ("value", "limit")]
        lines.append([goal["table"], goal["goal"], *numbers, "met" if goal["met"] else "MISSED"])
    _print_aligned(lines)
    for name, found in results["informed"].items():
        print(f"\n{name}: an additive model that is told the true prior and the noise, middle budget, one at a time")
        lines = [["start", "draws at", "area", f"regret after {NUM_TRIALS}", "to 5 %"]]
        for row in found["searches"]:
            ends, reached = percent(row["regret"][NUM_TRIALS]), spread(row["to_5_percent"], ".0f", NEVER)
            start = "seeded" if row["seeded"] else "blind"
            lines.append([start, f"{row['restlessness']:g} sd", percent(row["area"]), ends, reached])
        _print_aligned(lines)
        medians = ", ".join(f"{values[1]:.1%} ({number})" for number, values in found["random_plans"].items())
        print(f"told random plans instead, median regret: {medians}")


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
    try:
        for path, fraction in itertools.product(paths, FRACTIONS):
            Table.read(path).check_whole(fraction)
    except (BadTable, OSError) as error:
        parser.error(str(error))
    tasks = tasks_of(paths, arguments.searchers, arguments.seeds)
    if arguments.stored:
        held = stored(arguments.keep)
        tasks = [task for task in tasks if task in held]
    replays = replay_all(tasks, arguments.jobs, arguments.keep)
    rows = summarize(replays)
    results = {
        "rows": [columns_of(row) for row in rows],
        "asha": asha_against_full(replays),
        "patience": patience_of(replays),
        "ablation": [found for path in paths for found in ablation(path)],
        "goals": goals_of(rows),
        "informed": {path.stem: informed(path) for path in paths if knows_informed(Table.read(path))},
        "plot": str(arguments.plot),
    }
    show(results, rows)
    draw(rows, arguments.plot)
    print(json.dumps(_of_json(results), allow_nan=False))


def _of_json(value: Any) -> Any:
    """As JSON can have it: what is never reached is null."""
    if isinstance(value, Mapping):
        return {key: _of_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_of_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
