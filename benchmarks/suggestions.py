"""Time a batch of suggestions of `gp` in a large search, and how long reports wait meanwhile.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/suggestions.py --trials 64 2000

The space is made up: 120 groups in 8 formats. Half of the trials were stopped at the first of two
rungs. While the batch is proposed, a trial reports every 10 ms. Prints one JSON line for each
number of trials; processor seconds are those of the whole process.
"""

import argparse
import json
import time

import numpy as np

from qpruner.cluster.tune import make_proposer
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.quantization.formats import by_size, format_of
from qpruner.search.searchers import Ledger, Observation, Suggestion

LEVELS = by_size(("w2", "w3", "w4", "nf4", "q5_0", "int8", "q8_0", "bf16"))
NUM_BLOCKS = 30
KINDS = ("qkv", "o", "gate_up", "down")


def made_space() -> SearchSpace:
    """Return plans of 120 groups of unlike sizes, in a third of the bytes between the extremes."""
    names = [f"layers.{block:02d}.{kind}" for block in range(NUM_BLOCKS) for kind in KINDS]
    weights = np.random.default_rng(0).integers(50_000, 200_000, len(names))
    bits = [format_of(level).bits for level in LEVELS]
    group_bytes = tuple(tuple(int(weight * size / 8) for size in bits) for weight in weights)
    smallest = sum(sizes[0] for sizes in group_bytes)
    largest = sum(sizes[-1] for sizes in group_bytes)
    budget = smallest + (largest - smallest) // 3
    return SearchSpace((PlanSpace(tuple(names), LEVELS, group_bytes, 0, budget),))


def made_ledger(num_trials: int) -> tuple[Ledger, list[Suggestion]]:
    """Return a ledger that knows random trials, and these."""
    space = made_space()
    generator = np.random.default_rng(1)
    bits = np.array([format_of(level).bits for level in LEVELS])
    sensitivities = 0.02 * generator.exponential(size=len(space.groups))
    effects = np.outer(sensitivities, 4.0 ** (2 - bits))  # (groups, levels)
    predicted = effects * generator.lognormal(size=(len(space.groups), 1))
    prior = {level: predicted[:, at].tolist() for at, level in enumerate(LEVELS)}
    ledger = Ledger(space, make_proposer("gp", space, 0, {"kl": prior}), [], 10**6)
    trials = []
    for index in range(num_trials):
        levels = generator.integers(len(LEVELS), size=len(space.groups))
        trial = Suggestion(space.plan_of([*levels, 0]), index, "gp")
        loss = 3 + effects[np.arange(len(levels)), levels].sum()
        loss += 0.003 * generator.standard_normal()
        rungs = [Observation(index, trial.plan, 4, loss + 0.3)]
        if index % 2:
            rungs.append(Observation(index, trial.plan, 8, loss))
        ledger.recall(trial, rungs)
        ledger.close(trial)
        trials.append(trial)
    return ledger, trials


def measure(num_trials: int, number: int) -> dict[str, float]:
    """Hand out a batch of suggestions while trials report."""
    ledger, trials = made_ledger(num_trials)
    start = time.perf_counter()
    processor_start = time.process_time()
    handed_out = 0
    longest = 0.0
    reports = 0
    while handed_out < number:
        begin = time.perf_counter()
        suggestion = ledger.poll(number - handed_out)
        trial = trials[reports % len(trials)]
        ledger.observe(Observation(trial.index, trial.plan, 4, 3.5))
        reports += 1
        longest = max(longest, time.perf_counter() - begin)
        handed_out += suggestion is not None
        if suggestion is None:
            time.sleep(0.01)
    return {
        "trials": num_trials,
        "suggestions": number,
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": round(time.process_time() - processor_start, 2),
        "reports": reports,
        "longest_wait_seconds": round(longest, 4),
    }


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[64, 2000])
    parser.add_argument("--suggestions", type=int, default=64)
    options = parser.parse_args()
    for num_trials in options.trials:
        print(json.dumps(measure(num_trials, options.suggestions)), flush=True)


if __name__ == "__main__":
    main()
