"""Compare what a search returns with the best control and the paper's flow: equal bytes, equal
fine-tune, fresh rows.

    .venv/bin/python benchmarks/reach.py benchmarks/reach_smollm2.yaml --out runs/reach \
        [--budgets 60 75 90 110 127] [--formats llama.cpp all] [--set KEY=VALUE ...]

For every budget (MB, adapters included) and set of formats the search runs as `qpruner search`
does, without the trials of other budgets. Then the plan that it returns, the best control by the
rows that choose, and the paper's plan get the fine-tune of `finetune` under three training seeds
that no trial had, and are scored on the rows that judge. A row of the table is the difference of
the returned plan to another, paired by row and seed, with its 95 % interval over seeds and rows.
Finished settings are kept in OUT.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import (
    append_record,
    command_line,
    fresh_processes,
    print_heading,
    print_row,
    read_records,
)
from joint_table import opened

from qpruner.config.load import load_config
from qpruner.data import measures
from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import paper_plan
from qpruner.pipeline.finetune import final_job
from qpruner.pipeline.run import run
from qpruner.pipeline.tuning import distinct
from qpruner.plans.plan import PrecisionPlan, plan_of
from qpruner.runs.records import FineTune, SearchRecord
from qpruner.runs.storage import remove
from qpruner.training.jobs import FineTuneJob, tune

FORMATS = {
    "llama.cpp": ("q4_0,q5_0,q8_0", "q4_0,q5_0,q8_0"),
    "all": ("w2_g32,w3,w4,nf4,q4_0,q5_0,w8,q8_0", "w3,q4_0,q5_0,q8_0"),
}
"""Formats for blocks and for embeddings: those of llama.cpp, and one of each kind and bits."""
SEEDS = (1, 2, 3)  # trials have 0


def rivals(context: Context) -> dict[str, tuple[str, PrecisionPlan]]:
    """Name the plans to compare: what the search returned, the best control, and the paper's if it
    is in the budget."""
    searched = context.record(SearchRecord)
    controls = [each for each in searched.finalists if each.control and each.fits]
    returned = (
        searched.winner.origin,
        plan_of(searched.winner),
    )
    found = {"returned": returned}
    if searched.winner.control:
        found["control"] = returned
    elif searched.rival is not None:
        best = searched.finalist(searched.rival)
        found["control"] = (best.origin, plan_of(best))
    paper = paper_plan(context)
    if paper and any(each.plan == paper.as_dict() and each.cut == paper.cut for each in controls):
        found["paper"] = ("paper", paper)
    return found


def tuned(jobs: Sequence[FineTuneJob], out: Path, processes: int) -> dict[str, list[float]]:
    """Fine-tune what is not yet, and return the loss of each judging row by digest."""
    out.mkdir(parents=True, exist_ok=True)
    files = {job.record.digest: out / f"{job.record.digest}.json" for job in jobs}
    left = [job for job in jobs if not files[job.record.digest].exists()]
    with fresh_processes(processes) as pool:
        for record, _ in pool.map(tune, left):
            files[record.digest].write_text(record.model_dump_json())
    records = {
        digest: FineTune.model_validate_json(file.read_text()) for digest, file in files.items()
    }
    return {digest: list(record.confirmation.by_row) for digest, record in records.items()}


def compared(ours: list[list[float]], theirs: list[list[float]]) -> tuple[float, float]:
    """Return ours minus theirs, and half of its 95 % interval; each has the losses of all rows
    under each seed."""
    found = measures.interval([[measures.less(*both)] for both in zip(ours, theirs, strict=True)])
    assert found.half_width is not None
    return found.mean, found.half_width


def measure(context: Context, out: Path, processes: int) -> dict[str, Any]:
    """Fine-tune and compare the plans of one finished search."""
    searched = context.record(SearchRecord)
    named = rivals(context)
    jobs = {
        name: [final_job(context, name, origin, plan, context.config.seed + seed) for seed in SEEDS]
        for name, (origin, plan) in named.items()
    }
    models = distinct(sum(jobs.values(), list[FineTuneJob]()))
    losses = tuned(models, out / "tuned", processes)
    by_name = {name: [losses[job.record.digest] for job in own] for name, own in jobs.items()}
    found: dict[str, Any] = {
        "trials": searched.num_trials,
        "stopped": searched.num_stopped,
        "cut": searched.winner.cut,
        "origins": {name: origin for name, (origin, _) in named.items()},
        "plans": {name: str(plan) for name, (_, plan) in named.items()},
        "bytes": {
            name: context.shapes.layout_of(plan.cut).plan_bytes(plan)
            for name, (_, plan) in named.items()
        },
        "losses": {name: [fmean(losses) for losses in own] for name, own in by_name.items()},
        # To compare settings.
        "row_losses": {
            name: [[round(each, 4) for each in own] for own in of] for name, of in by_name.items()
        },
    }
    found["against"] = {
        name: compared(by_name["returned"], own)
        for name, own in by_name.items()
        if own != by_name["returned"]
    }
    return found


def space_overrides(formats: str, megabytes: float) -> list[str]:
    """Return the settings of what is searched in a budget."""
    blocks, embeddings = FORMATS[formats]
    # Of llama.cpp's formats the smallest plan of the 20 % cut takes 68 MB.
    rates = "[0,0.2,0.4]" if megabytes < 70 else "[0,0.1,0.2]"
    return [
        f"quantize.formats=[{blocks}]",
        f"quantize.embeddings=[{embeddings}]",
        f"prune.rates={rates}",
    ]


def main() -> None:
    """Measure all settings that are not yet in OUT/reach.jsonl, and print the table."""
    parser = command_line(__doc__, overrides=True)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[60, 75, 90, 110, 127], help="in MB"
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    run_folder = arguments.out / "run"
    file = arguments.out / "reach.jsonl"
    known = read_records(file)
    print_heading(
        ["formats", "MB", "trials (stopped)", "returned", "against", "loss", "theirs", "difference"]
    )
    for formats, budget in product(arguments.formats, arguments.budgets):
        setting = {"formats": formats, "budget": budget, "set": arguments.overrides}
        record = next((record for record in known if record["setting"] == setting), None)
        if record is None:
            config = load_config(
                arguments.config,
                [
                    f"output={run_folder}",
                    f"quantize.budget.bytes={round(budget * 1e6)}",
                    *space_overrides(formats, budget),
                    *arguments.overrides,
                ],
            )
            for name in ("trials", "records/search.json"):  # those of another setting
                remove(run_folder / name)
            run(config, lambda event: None, until="search")
            compared_plans = measure(opened(config), arguments.out, arguments.processes)
            record = {"setting": setting, **compared_plans}
            append_record(file, record)
        show(record)


def show(record: dict[str, Any]) -> None:
    """Print the rows of one search."""
    means = {name: fmean(losses) for name, losses in record["losses"].items()}
    search = [
        record["setting"]["formats"],
        f"{record['setting']['budget']:g}",
        f"{record['trials']} ({record['stopped']})",
        f"{record['origins']['returned']}, {record['cut']}",
    ]
    loss = f"{means['returned']:.4f}"
    if not record["against"]:
        print_row([*search, "is the best control", loss, "", ""])
    for name, (less, half_width) in record["against"].items():
        difference = f"{less:+.4f} ± {half_width:.4f}"
        print_row([*search, record["origins"][name], loss, f"{means[name]:.4f}", difference])


if __name__ == "__main__":
    main()
