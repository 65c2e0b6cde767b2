"""The rows of the final table, and the jobs that fine-tune and score them.

A row has one or more fine-tunes, which differ in training seed or plan; each fine-tune is a job.
The folder of a job is named by the digest of everything that the job depends on. Equal jobs share a
folder, and later commands reuse it.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import controls
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import UNPRUNED, PrecisionPlan, plan_of
from qpruner.runs.events import Progress
from qpruner.runs.records import (
    BASE,
    BEST_SEARCHED,
    PAPER,
    PRUNED,
    RANDOM,
    SEARCHED,
    SearchRecord,
    digest_of,
)
from qpruner.runs.storage import for_each, published_folders, read_progress
from qpruner.search.choice import random_plans
from qpruner.search.roles import is_beaten, title_of
from qpruner.training.table_rows import Candidate, CandidateJob
from qpruner.wording import counted


@dataclass(frozen=True)
class Row:
    """One row of the final table, with a training seed and a plan for each of its fine-tunes."""

    name: str
    origin: str
    plans: tuple[tuple[int, PrecisionPlan], ...]


Result = TypeVar("Result")


def winner_row(context: Context) -> Row:
    """Return the row of the winning plan, with the first training seed.

    This seed differs from the seed of the trials: with the data order of its trial, the winner
    would look too good.
    """
    searched = context.record(SearchRecord)
    plan = PrecisionPlan.from_dict(searched.best_plan, searched.best_cut)
    return Row(
        SEARCHED,
        f"{searched.best_origin}, trial {searched.best_index}",
        ((context.config.seed + 1, plan),),
    )


def table_rows(context: Context) -> list[Row]:
    """List the rows of the final table in order.

    Controls that the winner beat as trials are left out, but its rival and the paper's flow stay.
    If a control won, the rival is the best searched plan. Random plans have about the winner's
    bytes, and its cut. The winner, its rival and the random plans get `finetune.seeds` training
    seeds each, the other rows get one.
    """
    config, winner, searched = context.config, winner_row(context), context.record(SearchRecord)
    [(first, plan)] = winner.plans
    seeds = range(first, first + config.finetune.seeds)
    rival = None if searched.rival is None else searched.finalist(searched.rival)
    beaten = {
        (each.cut, *each.plan.items()) for each in searched.finalists if is_beaten(each, searched)
    }

    def same(name: str, origin: str, plan: PrecisionPlan, under: Iterable[int] = seeds[:1]) -> Row:
        return Row(name, origin, tuple((seed, plan) for seed in under))

    rows = [same(name, "unquantized", each) for name, each in _unquantized(context, plan)]
    dense = {each for row in rows for _, each in row.plans}
    for name, each in controls(context):
        is_rival = rival is not None and plan_of(rival) == each
        if each not in dense and (
            is_rival or name == PAPER or (each.cut, *each.as_dict().items()) not in beaten
        ):
            rows.append(same(name, name, each, seeds if is_rival else seeds[:1]))
    if rival is not None and not rival.control:
        rows.append(
            same(BEST_SEARCHED, f"{rival.origin}, trial {rival.index}", plan_of(rival), seeds)
        )
    space = context.shapes.space_of(plan.cut)
    drawn = (
        random_plans(space, plan, config.finetune.random_plans, config.seed)
        if plan in space
        else []
    )
    if drawn:
        rows.append(
            Row(RANDOM, counted(len(drawn), "random plan"), tuple(itertools.product(seeds, drawn)))
        )
    return [*rows, same(SEARCHED, winner.origin, plan, seeds)]


def _unquantized(context: Context, winner: PrecisionPlan) -> list[tuple[str, PrecisionPlan]]:
    """List the base model, and the pruned model that the winner quantizes, without formats."""
    rows = [(BASE, context.shapes.layout_of(UNPRUNED).dense())]
    return (
        rows
        if winner.cut == UNPRUNED
        else [*rows, (PRUNED, context.shapes.layout_of(winner.cut).dense())]
    )


def untuned_candidates(context: Context, winner: PrecisionPlan) -> list[Candidate]:
    """List the models without a fine-tune: base, pruned, and quantized by the winning plan."""
    return candidates_for(
        context, [(*each, None) for each in (*_unquantized(context, winner), (SEARCHED, winner))]
    )


def candidates_for(
    context: Context, wanted: Iterable[tuple[str, PrecisionPlan, int | None]]
) -> list[Candidate]:
    """Make a `Candidate` for each row name, plan and training seed (None: untuned).

    A candidate is a model to fine-tune or score.
    """
    config, run = context.config, context.run_dir
    searched, length = context.record(SearchRecord), (config.finetune.steps, config.finetune.epochs)
    settings = (config.lora, config.training, length, config.seed, config.evaluate.batch_size)
    found = []
    for name, plan, seed in wanted:
        bank, formats = context.places.bank_of(plan.cut), plan.as_dict()
        # Everything that a fine-tune depends on.
        digest = digest_of(
            bank.inputs, bank.digests(formats.values()), *settings, plan.cut, formats, seed
        )
        folder, title = run.candidates / digest, title_of(name, searched)
        found.append(Candidate(name, title, bank, formats, folder, seed, cut=plan.cut))
    return found


def jobs_of(context: Context, rows: Iterable[Row]) -> list[Candidate]:
    """Make a job for each fine-tune of each row."""
    wanted = [(row.origin, [(row.name, plan, seed) for seed, plan in row.plans]) for row in rows]
    return [
        replace(job, origin=origin)
        for origin, each in wanted
        for job in candidates_for(context, each)
    ]


def job_keys(jobs: Iterable[Candidate]) -> list[tuple[str, str, int | None, str]]:
    """List row name, origin of the plan, training seed and folder of each job, for a digest."""
    return [(job.name, job.origin, job.seed, job.folder.name) for job in jobs]


def distinct(jobs: Iterable[Candidate]) -> list[Candidate]:
    """Return one candidate per folder.

    Rows of the final table with the same plan and fine-tune share a folder.
    """
    return list({job.folder: job for job in jobs}.values())


def run_jobs(
    stage: Stage[Any],
    function: Callable[[CandidateJob], Result],
    jobs: Sequence[Candidate],
    found: Collection[Path],
    unit: str,
    num_workers: int = 1,
    text: Path | None = None,  # folder of encoded text for perplexity
    own_process: bool = False,
    **more: Any,
) -> Iterator[tuple[Candidate, Result]]:
    """Run a function in parallel on the jobs whose folders are not in `found`.

    Each runs in `num_workers` processes. Yield each job with its result as it ends, and emit the
    progress of all in `unit`.
    """
    context, left = stage.context, [job for job in jobs if job.folder not in found]
    if not left:
        return
    more["on_tick"] = job_progress(stage, [job.progress for job in left], len(jobs), unit)
    more["progress"] = lambda position: sorted(published_folders(left[position].checkpoints))
    resources, concurrent = context.machines.task_resources(len(left), num_workers)
    threads = int(resources.get("cpu", 1))
    tasks = [
        CandidateJob(
            context.worker_config, job, context.places.data, threads, text, context.trackers
        )
        for job in left
    ]
    if num_workers == 1:
        results = context.machines.run_tasks(
            function, tasks, resources, concurrent, own_process, **more
        )
    else:
        from qpruner.cluster.group import run_groups

        scratch, check = context.run_dir.scratch("train"), context.machines.check_node
        results = run_groups(
            function, tasks, resources, num_workers, concurrent, scratch, check, **more
        )
    for position, result in results:
        yield left[position], result


def job_progress(
    stage: Stage[Any], files: list[Path], num_jobs: int, unit: str
) -> Callable[[], None]:
    """Return a callback that emits the progress of equally long jobs.

    It is summed from the progress files of workers. `files` are those of the unfinished jobs, each
    with the text `done total`; `num_jobs` counts finished jobs too.
    """
    last = -1

    def emit() -> None:
        nonlocal last
        found = [(text or "").split() for text in for_each(read_progress, files)]
        parts = [(int(fields[0]), int(fields[1])) for fields in found if len(fields) == 2]
        if not parts:
            return
        each = parts[0][1]
        done = (num_jobs - len(files)) * each + sum(done for done, _ in parts)
        if done != last:
            last = done
            stage.context.emit(Progress(stage.name, done, num_jobs * each, unit))

    return emit
