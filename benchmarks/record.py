"""The table of record: peers at the bytes they are served at, and qpruner at the same bytes.

    # llama.cpp's quantizer, which xllamacpp lacks
    npm install --prefix NPM @node-llama-cpp/linux-x64@3.22.1
    .venv/bin/python benchmarks/record.py benchmarks/record_smollm2.yaml --out runs/record \
        --libllama NPM --rows q4_0 ours-91.7 ... [--seeds 1 2 3] [--set KEY=VALUE ...] \
        [--peer PEER --peer-python PYTHON]

Every row gets the same fine-tune (`finetune` and `training` of the file) under three training seeds
that no trial had. Its files are written as they are served, and every figure of the row is of these
files: bytes, loss on the judging rows, perplexity of WikiText-2 and C4, accuracy on
`evaluate.tasks`, and speed on one thread. The quality of all rows is computed by transformers in
bf16, from the weights in the files; `served loss` of GGUF files is llama.cpp's own. Each row is
compared with our largest row that takes no more bytes, paired by row and seed; the 95 % intervals
hold the effects of both. OUT/record.jsonl keeps a line for each finished row and seed, which is
then not measured again. Without `--rows` only the table is printed.

Row `autoround` needs an interpreter with `auto-round auto-round-lib` beside qpruner (the second is
its kernel for CPUs; there were no version conflicts in November 2026). Row `llm-pruner` needs a
clone of LLM-Pruner and its interpreter (llm_pruner.py says which).
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import transformers
from harness import append_record, command_line, print_heading, print_row, read_records
from reach import SEEDS, compared
from record_rows import ROWS, Bench, Files, Start

from qpruner.config.load import load_config
from qpruner.config.schema import RunConfig
from qpruner.data import measures
from qpruner.data.encoding import load_encoded, load_scored, text_windows
from qpruner.data.losses import mean_loss
from qpruner.data.sources import load_examples
from qpruner.export.gguf.isolation import isolated
from qpruner.export.recode import tensor_bytes
from qpruner.hf import load
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.pipeline.final_model import write_final
from qpruner.pipeline.run import run
from qpruner.pipeline.served_rows import (
    NEW_TOKENS,
    NUM_TURNS,
    PROMPT_TOKENS,
    Served,
    ServeJob,
    measure_in_turns,
)
from qpruner.runs.records import CONFIRMATION, FineTune, ServedRow
from qpruner.runs.run_dir import RunDir
from qpruner.runs.version import commit
from qpruner.training.evaluate import score_tasks
from qpruner.training.inference import take_turn
from qpruner.training.jobs import FineTuneJob, Scoring, tune

SLACK = 1.003  # bytes are equal up to this factor


# ---- measurement


@dataclass(frozen=True)
class Job:
    bench: Bench
    name: str
    start: Start
    seed: int


def measure(job: Job) -> dict[str, Any]:
    """Fine-tune, serve and score one row under one seed; under the first one time it too."""
    bench = job.bench
    row = ROWS[job.name]
    config = job.bench.config
    folder = bench.asked.out / "tuned" / f"{row.tuned}-{job.seed}"
    record = FineTune(
        digest=folder.name,
        name=row.tuned,
        origin=row.tuned,
        seed=job.seed,
        cut=job.start.cut,
        plan=job.start.plan,
        plan_bytes=0,  # the bytes of the files count
        mean_bits=0.0,
        num_parameters=0,
    )
    fine_tune = FineTuneJob(
        record=record,
        title=row.title,
        bank=job.start.bank,
        folder=folder,
        trained=folder / "trained",
        config=config,
        data=bench.data,
        scoring=Scoring(rows=CONFIRMATION),
    )
    known = folder / "measured.json"
    if not known.exists():
        folder.mkdir(parents=True, exist_ok=True)
        measured, _ = tune(fine_tune)
        known.write_text(measured.model_dump_json())
    tuned = json.loads(known.read_text())
    work = bench.asked.out / "files" / f"{job.name}-{job.seed}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    torch.set_num_threads(1)
    write_final(fine_tune, work / "final", lambda event: None)
    started = time.monotonic()
    files = row.serve(bench, job.start, work / "final", work / "served")
    packing = time.monotonic() - started
    is_gguf = files.loaded.suffix == ".gguf"
    model = (
        load_dense(str(files.loaded), config.model.dtype) if is_gguf else load(files.loaded)
    ).eval()
    found = {
        "row": job.name,
        "seed": job.seed,
        "plan": job.start.plan,
        "cut": job.start.cut,
        "bytes": sum(file.stat().st_size for file in files.folder.rglob("*") if file.is_file()),
        "tensor_bytes": tensor_bytes(files.folder),
        "peak_memory_bytes": tuned["peak_memory_bytes"],
        "seconds": {"search": job.start.seconds, "finetune": tuned["seconds"], "packing": packing},
        "steps": tuned["steps"],
        **scores(bench, model),
    }
    if job.seed == SEEDS[0]:
        found |= speeds(bench, files, model)
    shutil.rmtree(work)
    return found | provenance()


def scores(bench: Bench, model: Any) -> dict[str, Any]:
    """Losses by row and window, and right answers by question."""
    config = bench.config
    tokenizer = load_tokenizer(str(bench.model))
    texts = {"confirmation": load_scored(bench.data, CONFIRMATION)}
    for source in config.evaluate.text or ():
        examples = load_examples([source], "evaluate.text")
        windows = text_windows(
            [each.response for each in examples], tokenizer, config.data.max_length
        )
        texts[Path(source.source).stem] = windows[: config.evaluate.limit]
    pad_id = int(tokenizer.pad_token_id)
    size = config.evaluate.batch_size
    losses = {
        name: list(mean_loss(model, rows, pad_id, size).by_row) for name, rows in texts.items()
    }
    found = score_tasks(
        model, tokenizer, config.evaluate.tasks, config.evaluate, config.evaluate.limit
    )
    return {
        "losses": losses,
        "correct": {f"{each.task} {each.metric}": list(each.correct) for each in found},
    }


def speeds(bench: Bench, files: Files, model: Any) -> dict[str, Any]:
    """Tokens a second on one thread, and the loss in llama.cpp, of the program that serves these
    files."""
    if files.gguf:
        about = ServedRow(name="record", form="gguf", format="plan", mean_bits=0.0, file_bytes=0)
        job: Any = ServeJob(
            bench.config, bench.asked.out, bench.model, bench.data, files.folder, 1, None, None
        )  # type: ignore[arg-type]
        *_, last = isolated(measure_in_turns, job, [Served(about, *files.gguf)])
        [served] = last["rows"]
        prefill, decode = served.prefill_tokens_per_second, served.decode_tokens_per_second
        told = {"served_by": last["setting"].build, "served_loss": served.loss}
    else:
        ids = [
            token for row in load_encoded(bench.data / "confirmation") for token in row["input_ids"]
        ]
        turns = [take_turn(model, ids[:PROMPT_TOKENS], NEW_TOKENS)[:2] for _ in range(NUM_TURNS)]
        prefill, decode = zip(*turns, strict=True)
        told = {"served_by": f"transformers {transformers.__version__}"}
    return told | {"prefill": median(prefill), "decode": median(decode)}


def provenance() -> dict[str, str]:
    cpu = dict(
        line.partition("\t")[::2]
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    )
    name = cpu["model name"].strip("\t: ") + (" with AVX-512" if "avx512f" in cpu["flags"] else "")
    return {
        "commit": commit() or "unknown",
        "command": " ".join(sys.argv),
        "machine": f"{name}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }


# ---- table


def table(lines: list[dict[str, Any]]) -> None:
    """Print the rows of which all seeds are measured, then their differences to ours of as many
    bytes."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in ROWS:
        of_row = [line for line in lines if line["row"] == name]
        of_row.sort(key=lambda line: line["seed"])
        if [line["seed"] for line in of_row] == list(SEEDS):
            rows[name] = of_row
    if not rows:
        raise SystemExit(
            f"no row has all seeds yet; {len(lines)} of {len(ROWS) * len(SEEDS)} lines are measured"
        )
    rows = dict(sorted(rows.items(), key=lambda item: item[1][0]["bytes"]))
    texts = list(next(iter(rows.values()))[0]["losses"])
    measured = [*texts, "accuracy"]
    speeds = ["prefill", "decode", "served by"]
    print_heading(["row", "MB", *measured, "MB of fine-tune", "minutes", *speeds])
    for name, of_row in rows.items():
        print_row(row_cells(name, of_row, texts))
    print()
    print_heading(["row", "minus ours", *measured, "who wins"])
    for name, of_row in rows.items():
        most_bytes = SLACK * of_row[0]["bytes"]
        fitting = [
            other for other in rows if is_ours(other) and rows[other][0]["bytes"] <= most_bytes
        ]
        if fitting and not is_ours(name):
            print_row([name, fitting[-1], *against(of_row, rows[fitting[-1]], texts)])


def is_ours(name: str) -> bool:
    return name.startswith(("ours", "unsearched", "one-file", "kl"))


def row_cells(name: str, of_row: list[dict[str, Any]], texts: list[str]) -> list[str]:
    first = of_row[0]
    cells = [f"{name}: {ROWS[name].title}", f"{first['bytes'] / 1e6:.1f}"]
    for text in texts:
        mean, half = interval([[each["losses"][text]] for each in of_row])
        low_high = (
            f"{math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"
        )
        cells.append(f"{mean:.3f} ± {half:.3f}" if text == "confirmation" else low_high)
    cells.append(
        "{:.3f} ± {:.3f}".format(*interval([list(each["correct"].values()) for each in of_row]))
    )
    seconds = {part: fmean(each["seconds"][part] for each in of_row) for part in first["seconds"]}
    cells += [
        f"{max(each['peak_memory_bytes'] for each in of_row) / 1e6:.0f}",
        f"{sum(seconds.values()) / 60:.1f}",
    ]
    return [*cells, f"{first['prefill']:.0f}", f"{first['decode']:.0f}", first["served_by"]]


def interval(seeds: list[list[list[float]]]) -> tuple[float, float]:
    """Return mean and half of the 95 % interval, of values by seed, task and question."""
    found = measures.interval(seeds)
    assert found.half_width is not None
    return found.mean, found.half_width


def against(
    of_row: list[dict[str, Any]], ours: list[dict[str, Any]], texts: list[str]
) -> list[str]:
    """Return the differences of a row to ours, and who wins where the interval excludes 0."""
    found = [
        compared(*([each["losses"][text] for each in rows] for rows in (of_row, ours)))
        for text in texts
    ]
    differences = [
        [[one - two for one, two in zip(*both, strict=True)]
         for both in zip(row["correct"].values(), other["correct"].values(), strict=True)]
        for row, other in zip(of_row, ours, strict=True)
    ]  # fmt: skip
    found.append(interval(differences))
    signs = [*(1 for _ in texts), -1]  # of a loss less is better, of accuracy more
    by_winner: dict[str, list[str]] = {"this row": [], "ours": []}
    for text, sign, (mean, half) in zip([*texts, "accuracy"], signs, found, strict=True):
        if abs(mean) > half:
            by_winner["this row" if sign * mean < 0 else "ours"].append(text)
    wins = "; ".join(
        f"{winner}: {', '.join(where)}" for winner, where in by_winner.items() if where
    )
    return [*(f"{less:+.3f} ± {width:.3f}" for less, width in found), wins or "neither"]


def prepared(config: RunConfig, asked: argparse.Namespace) -> Bench:
    found = run(config, lambda event: None, until="prepare").prepare
    place = RunDir(config.output)
    assert found
    return Bench(config, asked, place.base_model(found), place.stage("prepare") / "data")


def main() -> None:
    parser = command_line(__doc__, overrides=True)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[])
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument(
        "--libllama", type=Path, help="a folder with libllama's build of node-llama-cpp below it"
    )
    parser.add_argument("--peer", type=Path, help="a clone of LLM-Pruner")
    parser.add_argument("--peer-python", type=Path, help="an interpreter with transformers 4.43.4")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    asked.out = asked.out.absolute()
    file = asked.out / "record.jsonl"
    lines = read_records(file)
    config = load_config(asked.config, [f"output={asked.out / 'base'}", *asked.overrides])
    known = {(line["row"], line["seed"]) for line in lines}
    settings = asked.out / "config.json"
    text = config.model_dump_json()
    if settings.exists() and settings.read_text() != text:
        raise SystemExit(
            f"`--out`: {asked.out} has rows of another configuration: name another folder"
        )
    asked.out.mkdir(parents=True, exist_ok=True)
    settings.write_text(text)
    wanted = {
        name: [seed for seed in asked.seeds if (name, seed) not in known] for name in asked.rows
    }
    left = {name: seeds for name, seeds in wanted.items() if seeds}
    if left:
        bench = prepared(config, asked)
    for name, seeds in left.items():
        start = ROWS[name].start(bench)
        # The first seed alone: its speeds are measured with nothing beside.
        for part in (
            [seed for seed in seeds if seed == SEEDS[0]],
            [seed for seed in seeds if seed != SEEDS[0]],
        ):
            with ProcessPoolExecutor(
                asked.processes, get_context("spawn"), max_tasks_per_child=1
            ) as pool:
                for found in pool.map(measure, [Job(bench, name, start, seed) for seed in part]):
                    lines.append(found)
                    append_record(file, found)
    table(lines)


if __name__ == "__main__":
    main()
