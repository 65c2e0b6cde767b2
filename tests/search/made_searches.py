"""Searches on six small groups, their trials, and spaces of plans, for several files of tests."""

import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import raw_config, with_keys

from qpruner.cluster.tune import SearchJob
from qpruner.config.load import validate_config
from qpruner.plans.plan import UNPRUNED, Group, Layout, LinearShape, PrecisionPlan
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.runs.records import RungResult, TrialRecord
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials

MINE, ANOTHER = "a" * 16, "b" * 16
"""Digests of searches."""
LETTERS = {"4": "nf4", "8": "int8", "F": "bf16"}
BITS = {"nf4": 4, "int8": 8, "bf16": 16}
GROUPS = tuple(
    Group(f"layers.{index}", (LinearShape(f"layers.{index}", 64, 64),), ("nf4", "int8"))
    for index in range(6)
)
LAYOUT = Layout(GROUPS, 1000, 300, 2, num_parameters=10**5, multiply_adds=10**5)


def plan_of(text: str) -> PrecisionPlan:
    return PrecisionPlan(
        tuple(group.name for group in GROUPS), tuple(LETTERS[letter] for letter in text)
    )


SEED_PLAN = "884444"
CONTROLS = [("unpruned-uniform", plan_of("444444")), ("unpruned-knapsack", plan_of(SEED_PLAN))]


def space_of(
    names: Sequence[str],
    levels: tuple[str, ...] = ("nf4", "int8"),
    share: float = 0.5,
    seed: int = 0,
) -> PlanSpace:
    """Groups of unlike sizes, and a budget at this share of the way from the smallest plan to the
    largest."""
    weights = np.random.default_rng(seed).integers(50, 200, len(names))
    group_bytes = tuple(tuple(int(weight) * BITS[name] for name in levels) for weight in weights)
    lowest, highest = (sum(sizes[at] for sizes in group_bytes) for at in (0, -1))
    return PlanSpace(
        tuple(names), levels, group_bytes, 1000, 1000 + int(lowest + share * (highest - lowest))
    )


def masked_space(
    share: float = 0.5, levels: tuple[str, ...] = ("nf4", "int8", "bf16")
) -> PlanSpace:
    """Embeddings without the first level, blocks without the last, a tied group of one level, and a
    budget."""
    names = ("embeddings", *blocks(6), "odd")
    sizes = np.random.default_rng(3).integers(50, 200, len(names))
    refused = {"embeddings": levels[:1], "odd": (levels[0], levels[-1])}
    group_bytes = tuple(
        tuple(
            None if level in refused.get(name, levels[-1:]) else int(size) * BITS[level]
            for level in levels
        )
        for name, size in zip(names, sizes, strict=True)
    )
    offered = [[size for size in each if size is not None] for each in group_bytes]
    lowest = sum(map(min, offered))
    highest = sum(map(max, offered))
    return PlanSpace(
        names, levels, group_bytes, 1000, 1000 + int(lowest + share * (highest - lowest))
    )


def plans_in(space: PlanSpace) -> list[PrecisionPlan]:
    """Every plan of a space, over budget or not."""
    return [space.plan_of(indices) for indices in itertools.product(*space.offered)]


def blocks(number: int) -> list[str]:
    return [f"layers.{index:02d}" for index in range(number)]


def job_of(folder: Path, **settings: Any) -> SearchJob:
    """A search whose budget holds three groups at 8 bits."""
    keys = {f"search.{key}": value for key, value in settings.items()}
    return SearchJob(
        config=validate_config(with_keys(raw_config(Path("model"), folder / "run"), **keys)),
        trial=run_trial,
        materials=Materials({}, folder),
        layouts={UNPRUNED: LAYOUT},
        space=SearchSpace((PlanSpace.of(LAYOUT, LAYOUT.plan_bytes(plan_of("888444"))),)),
        may_win=(UNPRUNED,),
        controls=CONTROLS,
        priors={},
        trials=folder / "trials",
        scratch=folder / "tune",
        digest="0" * 16,
        search=MINE,
        resources={"cpu": 1.0},
        check_node=pickle.dumps(dict),
    )


def trial(
    index: int, plan: str, losses: Sequence[float], search: str = MINE, **fields: Any
) -> TrialRecord:
    """A trial that reached as many rungs (steps 1, 2, 4) as there are losses; finished if that is
    all of them."""
    rungs = tuple(
        RungResult(step=step, loss=loss) for step, loss in zip((1, 2, 4), losses, strict=False)
    )
    given = {
        "origin": "random",
        "status": "finished" if len(losses) == 3 else "stopped",
        "rungs": rungs,
    } | fields
    return TrialRecord(
        index=index,
        digest="0" * 16,
        search=search,
        plan=plan_of(plan).as_dict(),
        plan_bytes=LAYOUT.plan_bytes(plan_of(plan)),
        mean_bits=LAYOUT.mean_bits(plan_of(plan)),
        **given,
    )
