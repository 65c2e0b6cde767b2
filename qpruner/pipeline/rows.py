"""The rows of the final table: the winner, which plans stand beside it, and under how many training seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from qpruner.pipeline.context import Context
from qpruner.plans.plan import FULL_BITS, PrecisionPlan
from qpruner.report.results import (
    BASE,
    BEST_SEED,
    MUTUAL_INFORMATION,
    PRUNED,
    RANDOM,
    SEARCHED,
    UNIFORM,
    title_of,
)
from qpruner.runs.records import BankRecord, PrepareRecord, SearchRecord, SensitivityRecord, digest_of
from qpruner.search.choice import controls_of
from qpruner.search.random_plans import random_plans
from qpruner.search.trial_records import objective
from qpruner.sensitivity.seeds import seed_origin, seed_plan
from qpruner.training.table_rows import Candidate
from qpruner.wording import counted


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: As the records have it.
        origin: Where its plans came from.
        plans: A training seed and a plan for each fine-tune; one plan under all seeds, except in the random row.
    """

    name: str
    origin: str
    plans: tuple[tuple[int, PrecisionPlan], ...]


def winner_row(context: Context, searched: SearchRecord) -> Row:
    """The winner under the first training seed, which is not the trials' own: under the data order that the winner was
    selected on it would be flattered."""
    plan = PrecisionPlan.from_dict(searched.best_plan)
    return Row(SEARCHED, f"{searched.best_origin}, trial {searched.best_index}", ((context.config.seed + 1, plan),))


def table_rows(context: Context, searched: SearchRecord, measured: SensitivityRecord) -> list[Row]:
    """Every row of the comparison.

    Seed plans are solved again at the winner's own bytes, and the random plans weigh as much, so that the claim
    compares like with like. The searched plan, the best seed and each of the random plans get `finetune.seeds` training
    seeds, the others the first of them.
    """
    config, space, winner = context.config, context.space, winner_row(context, searched)
    [(first, plan)] = winner.plans
    seeds = range(first, first + config.finetune.seeds)
    equal_bytes = replace(space, budget_bytes=space.plan_bytes(plan))

    def same(name: str, origin: str, plan: PrecisionPlan, under: Iterable[int] = seeds[:1]) -> Row:
        return Row(name, origin, tuple((seed, plan) for seed in under))

    def seed_row(name: str, method: str, under: Iterable[int]) -> Row:
        origin = f"{seed_origin(method)} at the winner's bytes"
        return same(name, origin, seed_plan(measured.methods[method].values, equal_bytes), under)

    full = space.uniform(FULL_BITS)
    rows = [same(BASE, "unquantized", full), same(PRUNED, "unquantized", full)]
    rows += [same(f"uniform {bits}-bit", UNIFORM, space.uniform(bits)) for bits in space.levels if bits != FULL_BITS]
    best = _best_seed_method(context, searched, measured)
    for method in measured.methods:
        if method == MUTUAL_INFORMATION or (config.finetune.seed_rows == "all" and method != best):
            rows.append(seed_row(f"{method.replace('_', '-')} seed", method, seeds[:1]))
    if best:
        rows.append(seed_row(BEST_SEED, best, seeds))
    drawn = random_plans(space, plan, config.finetune.random_plans, config.seed)
    if drawn:
        rows.append(Row(RANDOM, counted(len(drawn), "random plan"), tuple(itertools.product(seeds, drawn))))
    return [*rows, same(SEARCHED, winner.origin, plan, seeds)]


def _best_seed_method(context: Context, searched: SearchRecord, measured: SensitivityRecord) -> str | None:
    """The sensitivity whose seed plan was best on fresh rows; None where none was confirmed."""
    names = {seed_origin(method): method for method in measured.methods}
    controls = controls_of(context.space, {name: method.values for name, method in measured.methods.items()})
    # A plan that is several controls ran once, under one of its names.
    of_plan = {plan: names[origin] for origin, plan in reversed(controls) if origin in names}
    methods = {origin: of_plan[plan] for origin, plan in controls if plan in of_plan}
    seeds = [each for each in searched.confirmations if each.control and each.origin in methods]
    best = min(seeds, key=lambda each: (objective(each, context.config), each.index), default=None)
    return methods[best.origin] if best else None


def untuned_candidates(context: Context, winner: Mapping[str, int]) -> list[Candidate]:
    """The model as each step before the fine-tune leaves it: base, pruned, and quantized by the winner's plan."""
    full = context.space.uniform(FULL_BITS).as_dict()
    steps = ((BASE, full), (PRUNED, full), (SEARCHED, winner))
    return candidates_for(context, [(name, plan, None) for name, plan in steps])


def candidates_for(context: Context, wanted: Iterable[tuple[str, Mapping[str, int], int | None]]) -> list[Candidate]:
    """Rows' plans under training seeds; equal models with equal fine-tunes share a folder, whatever their rows.

    Args:
        context: Of a run whose model is pruned and quantized.
        wanted: Name of a row, its plan and a training seed, None for no fine-tune.
    """
    config, run = context.config, context.run_dir
    prepared, banked = run.read_record("prepare", PrepareRecord), run.read_record("bank", BankRecord)
    searched = run.read_record("search", SearchRecord)
    assert prepared and banked, "prepare and bank run before"
    checkpoints = {BASE: run.base_model(prepared)}
    # All that a fine-tune depends on. Where checkpoints fall and which rows stand beside it change nothing.
    length = (config.finetune.steps, config.finetune.epochs)
    inputs = (banked.digest, config.lora, config.training, length, config.seed, config.evaluate.batch_size)
    return [
        Candidate(
            name=name,
            title=title_of(name, searched),
            checkpoint=checkpoints.get(name, run.stage("prune")),
            bank=context.bank,
            plan=dict(plan),
            folder=run.candidates / digest_of(*inputs, name == BASE, dict(plan), seed),
            seed=seed,
        )
        for name, plan, seed in wanted
    ]
