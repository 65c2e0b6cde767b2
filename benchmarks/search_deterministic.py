"""What `search.deterministic` costs: the same searches with and without it, 16 trials in flight, by time and regret.

    .venv/bin/python benchmarks/search_deterministic.py          # 8 minutes of one core

Replays on the tables in `benchmarks/tables`, as in `search_regret.py`: `gp` at the middle budget. A trial's duration is
log-normal with a standard deviation of 0.25 in its logarithm: the slowest of 16 takes half as long again as the median.
Time is in median durations of a whole trial. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import torch
from search_regret import TABLES
from search_replay import Table, Task, replay
from search_results import FRACTIONS, IN_FLIGHT, Limits, quartiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for path in sorted(TABLES.glob("*.json")):
        with_rungs = len(Table.read(path).steps) > 1
        for seeded, asha in itertools.product((False, True), (False, True) if with_rungs else (False,)):
            both = {
                deterministic: [
                    replay(Task(path, FRACTIONS[0], "gp", seeded, IN_FLIGHT, seed, asha, deterministic))
                    for seed in range(arguments.seeds)
                ]
                for deterministic in (False, True)
            }
            limits = Limits(itertools.chain(*both.values()))
            for deterministic, items in both.items():
                regrets = [limits.regrets(item, item.returned()) for item in items]
                found.append(
                    {
                        "table": path.stem,
                        "seeded": seeded,
                        "asha": asha,
                        "deterministic": deterministic,
                        "seeds": len(items),
                        "trials": quartiles([len(item.trials) for item in items]),
                        "duration": quartiles([item.duration for item in items]),
                        "regret_after_32": quartiles([float(each[:32][-1]) for each in regrets]),
                        "regret_at_end": quartiles([float(each[-1]) for each in regrets]),
                    }
                )
    print(f"{'table':32}{'start':8}{'ASHA':6}{'deterministic':15}{'time':20}{'regret after 32':24}at end")
    for row in found:
        time_taken = "{1:.1f} ({0:.1f}-{2:.1f})".format(*row["duration"])
        regrets = ["{1:.1%} ({0:.1%}-{2:.1%})".format(*row[key]) for key in ("regret_after_32", "regret_at_end")]
        asha, deterministic = ("yes" if row[key] else "no" for key in ("asha", "deterministic"))
        start = "seeded" if row["seeded"] else "blind"
        print(f"{row['table']:32}{start:8}{asha:6}{deterministic:15}{time_taken:20}{regrets[0]:24}{regrets[1]}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
