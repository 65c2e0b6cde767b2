"""Measure what a precision search would find: the loss of every plan of a small space, or of many plans of a large one.

    .venv/bin/python benchmarks/search_tables.py zero_shot --model FOLDER --text FILE --groups 10 --out T.json
    .venv/bin/python benchmarks/search_tables.py finetuned --model FOLDER --text FILE --groups 7 --out T.json
    .venv/bin/python benchmarks/search_tables.py surrogate --model FOLDER --text FILE --groups projection --out S.json

FOLDER is a dense checkpoint, pruned or not. `zero_shot` is the loss right after quantization with the LoftQ start,
`finetuned` after a short fine-tune from the bank, at every rung; `surrogate` measures `--plans` random plans without
fine-tune and fits main effects and pairs of neighbours to them, tested on plans left out. What is measured goes to
`OUT.lines` as it comes, so that a build that was interrupted goes on. `benchmarks/search_regret.py` replays the files.
Those in `tables/` have `--validation 16` (zero_shot, surrogate) and `--validation 32 --rungs 8 16` (finetuned). A
table's `loss_noise` is 0: trials share seed and data order, and a repeat is the same to the bit.

Text is cut into windows: the first for training, then validation, then calibration of the sensitivities (disjoint).
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qpruner.config.schema import MEASUREMENT, LoraConfig, QuantizeConfig, SensitivityConfig, TrainingConfig
from qpruner.data.calibration import Samples
from qpruner.data.losses import mean_loss, token_losses
from qpruner.models.families import family_of
from qpruner.models.layout import group_linears, layout_of
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.plans.plan import EMBEDDINGS, HEAD, Layout
from qpruner.pruning.compensation import BlockStream
from qpruner.quantization.assembly import PlanAssembler
from qpruner.quantization.bank import BankSource, read_plan
from qpruner.quantization.formats import ALIASES, DENSE, by_size, format_of
from qpruner.quantization.mixed import layer_tensors
from qpruner.sensitivity.measurement import measure, returning_outputs
from qpruner.sensitivity.methods import Subject, by_expansion, by_information, by_measurement
from qpruner.training.finetune import Listener, Schedule, finetune

LORA = LoraConfig(rank=8, alpha=16)
TRAINING = TrainingConfig(learning_rate=1e-3, batch_size=4, micro_batch_size=4, warmup_ratio=0.1)
DTYPE = "bfloat16"
NUM_CALIBRATION, NUM_MEASURED = 32, 8
"""Windows for the sensitivities, and those of them on which groups are quantized one at a time."""
NO_PAIRS = 1e6
"""A penalty on pairs that leaves none of them; chosen where pairs do not help on plans left out."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to measure plans."""

    model: str
    text: str
    bank: str
    groups: str
    levels: tuple[str, ...]
    context: int
    num_validation: int
    rungs: tuple[int, ...]

    @property
    def base_group(self) -> str:
        """How the bank groups layers; a number of groups means runs of consecutive blocks."""
        return "block" if self.groups.isdigit() else self.groups

    @property
    def source(self) -> BankSource:
        return BankSource(Path(self.bank), Path(self.model), self.base_group, DTYPE, LORA, 0, self.model)

    def members(self) -> dict[str, tuple[str, ...]]:
        """Table group -> the bank's groups in it."""
        from transformers import AutoConfig

        names = list(group_linears(AutoConfig.from_pretrained(self.model), self.base_group))
        if not self.groups.isdigit():
            return {name: (name,) for name in names}
        parts = np.array_split(np.array(names), int(self.groups))
        return {f"{part[0]}-{part[-1].rpartition('.')[2]}": tuple(part.tolist()) for part in parts}

    def formats(self, plan: Sequence[str]) -> dict[str, str]:
        """A table's plan as formats by the bank's groups."""
        return {name: level for members, level in zip(self.members().values(), plan, strict=True) for name in members}

    def layout(self) -> Layout:
        """The model's groups, embeddings and head unpacked."""
        from transformers import AutoConfig

        quantize = QuantizeConfig(group=self.base_group, formats=self.levels)  # type: ignore[arg-type]
        return layout_of(AutoConfig.from_pretrained(self.model), quantize, 2, LORA.rank, torch.cuda.is_available())

    def windows(self, first: int, count: int) -> list[dict[str, list[int]]]:
        """`count` windows of the text from window `first`."""
        ids = load_tokenizer(self.model)(Path(self.text).read_text(), add_special_tokens=False)["input_ids"]
        chosen = [ids[index * self.context : (index + 1) * self.context] for index in range(first, first + count)]
        return [{"input_ids": list(each), "labels": list(each)} for each in chosen]

    @property
    def num_train(self) -> int:
        return TRAINING.batch_size * max(self.rungs, default=0)

    def validation(self) -> list[dict[str, list[int]]]:
        return self.windows(self.num_train, self.num_validation)


class Evaluator:
    """Losses of plans without fine-tune; what the blocks before a change gave is used again."""

    @torch.no_grad()
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = load_dense(job.model, DTYPE).eval()
        rows = job.validation()
        self.labels = torch.tensor([row["labels"] for row in rows])
        self.stream = BlockStream(self.model, Samples(rows, 0, 16))
        self.start = self.stream._hidden
        self.paths = group_linears(self.model.config, job.base_group)
        self.members = job.members()
        self.formats = dict.fromkeys(self.paths, DENSE)
        self.weights: dict[tuple[str, str], torch.Tensor] = {}
        block_path = family_of(self.model.config).block_path
        self.blocks = [block_path(index) for index in range(self.model.config.num_hidden_layers)]
        self.modules = [self.model.get_submodule(path) for path in self.blocks]
        put: list[Any] = []
        handle = self.modules[0].register_forward_hook(lambda module, inputs, output: put.append(output))
        self.model(input_ids=self.labels[:1], use_cache=False)
        handle.remove()
        self.puts_tuples = isinstance(put[0], tuple)

    def set_format(self, name: str, level: str) -> None:
        """Put the weights of a bank group in a format in place: what quantization and the LoftQ start make of it."""
        if self.formats[name] == level:
            return
        for path in self.paths[name]:
            linear = self.model.get_submodule(path)
            self.weights.setdefault((path, self.formats[name]), linear.weight.data)
            if (path, level) not in self.weights:
                self.weights |= effective_weights(self.job.source, name, level, self._shapes(name))
            linear.weight.data = self.weights[path, level]
        self.formats[name] = level

    def _shapes(self, name: str) -> dict[str, int]:
        """Columns of a bank group's layers."""
        return {path: self.model.get_submodule(path).weight.shape[1] for path in self.paths[name]}

    def blocks_of(self, group: str) -> list[int]:
        """Blocks that a table group's layers are in."""
        found = {index for name in self.members[group] for path in self.paths[name] for index in self._blocks(path)}
        return sorted(found)

    def _blocks(self, path: str) -> Iterator[int]:
        yield from (index for index, block in enumerate(self.blocks) if path.startswith(f"{block}."))

    @torch.no_grad()
    def advance(self, hidden: list[torch.Tensor], blocks: Sequence[int]) -> list[torch.Tensor]:
        """Take hidden states through blocks."""
        self.stream._hidden = list(hidden)  # the stream puts a batch's new states in place of the old ones
        for index in blocks:
            self.stream.advance(index)
        return self.stream._hidden

    @torch.no_grad()
    def loss(self, hidden: list[torch.Tensor]) -> float:
        """Mean loss in nats a token from the last block's hidden states."""
        total, start = 0.0, 0
        for batch in hidden:
            labels = self.labels[start : start + len(batch)]
            # The model's own end: norm, scaling of the logits and what else a family has.
            output = (batch,) if self.puts_tuples else batch
            with returning_outputs(self.modules, [output] * len(self.modules)):
                inputs = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
                total += float(token_losses(self.model, inputs).sum())
            start += len(batch)
        return total / self.labels[:, 1:].numel()

    def every_plan(self, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
        """All plans that begin with a prefix, as a tree: blocks that plans share run once."""
        yield from self._below(0, self.start, prefix, ())

    def _below(
        self, depth: int, hidden: list[torch.Tensor], prefix: tuple[str, ...], plan: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], float]]:
        names = list(self.members)
        if depth == len(names):
            yield plan, self.loss(hidden)
            return
        for level in (prefix[depth],) if depth < len(prefix) else self.job.levels:
            for name in self.members[names[depth]]:
                self.set_format(name, level)
            after = self.advance(hidden, self.blocks_of(names[depth]))
            yield from self._below(depth + 1, after, prefix, (*plan, level))

    def one(self, plan: Sequence[str]) -> float:
        """Loss of a plan, from the first block on."""
        for name, level in self.job.formats(plan).items():
            self.set_format(name, level)
        return self.loss(self.advance(self.start, range(len(self.blocks))))


def effective_weights(
    bank: BankSource, group: str, level: str, columns: Mapping[str, int]
) -> dict[tuple[str, str], torch.Tensor]:
    """Return the weights with which the layers of a bank entry start a trial: ``Q + scaling B A``."""
    tensors = read_plan(bank, {group: level})
    found = {}
    for path, width in columns.items():
        own = layer_tensors(tensors, path)
        adapter = own.pop("lora_B") @ own.pop("lora_A") * (LORA.alpha / LORA.rank)
        found[path, level] = (format_of(level).unpack(own, width, torch.float32) + adapter).to(getattr(torch, DTYPE))
    return found


def finetuned(job: Job, plans: Sequence[tuple[tuple[str, ...], int]]) -> Iterator[dict[str, Any]]:
    """Loss of plans at every rung of a short fine-tune; each plan comes with its training seed."""
    bench = PlanAssembler(job.source)
    train, validation = job.windows(0, job.num_train), job.validation()
    for plan, seed in plans:
        started = time.monotonic()
        model = bench.model(job.formats(plan), seed)
        losses = {0: mean_loss(model, validation, 0, 16).mean}

        def on_rung(step: int, checkpoint: Path, loss: float, model: Any = model, losses: Any = losses) -> None:
            losses[step] = mean_loss(model, validation, 0, 16).mean

        with tempfile.TemporaryDirectory() as work:
            schedule = Schedule(steps=job.rungs[-1], rungs=job.rungs)
            finetune(model, train, TRAINING, schedule, Path(work), seed, 0, listener=Listener(on_rung=on_rung))
        yield {"plan": plan, "seed": seed, "losses": losses, "seconds": time.monotonic() - started}


def _work(kind: str, job: Job, todo: Sequence[Any], lines: str) -> None:
    torch.set_num_threads(1)

    def keep(found: dict[str, Any]) -> None:
        with open(lines, "a") as file:
            file.write(json.dumps(found) + "\n")

    if kind == "finetuned":
        for found in finetuned(job, todo):
            keep(found)
        return
    evaluator = Evaluator(job)
    if kind == "zero_shot":
        for prefix in todo:
            for plan, loss in evaluator.every_plan(prefix):
                keep({"plan": plan, "seed": 0, "losses": {0: loss}})
        return
    for plan in todo:
        keep({"plan": plan, "seed": 0, "losses": {0: evaluator.one(plan)}})


def build_bank(job: Job) -> None:
    """Every (group, format) that the bank lacks."""
    from transformers import AutoConfig

    names = group_linears(AutoConfig.from_pretrained(job.model), job.base_group)
    for level in job.levels:
        read_plan(job.source, dict.fromkeys(names, level))


def sensitivities(job: Job) -> dict[str, Any]:
    """Every method's scores of the table's groups, from windows that neither training nor validation has.

    Groups of several blocks get the sum of their blocks' scores.
    """
    model = load_dense(job.model, DTYPE)
    rows = job.windows(job.num_train + job.num_validation, NUM_CALIBRATION)
    groups = tuple(group for group in job.layout().groups if group.name not in (EMBEDDINGS, HEAD))
    subject = Subject(Samples(rows, 0, 16), groups, job.source)

    scores = by_information(model, subject, SensitivityConfig(), 0)
    scores |= by_expansion(model, subject, {method: {} for method in MEASUREMENT})
    started = time.monotonic()
    found = measure(model, Samples(rows[:NUM_MEASURED], 0, 16), subject.starts)
    scores |= by_measurement(found, groups, time.monotonic() - started)
    names = list(group_linears(model.config, job.base_group))
    values = {
        method: {
            level: [sum(by_group[names.index(name)] or 0.0 for name in each) for each in job.members().values()]
            for level, by_group in score.values.items()
        }
        for method, score in scores.items()
    }
    return {"sensitivities": values, "seconds": {method: score.seconds for method, score in scores.items()}}


def random_plans(num_groups: int, levels: Sequence[str], count: int, seed: int) -> list[tuple[str, ...]]:
    """Plans whose share of high levels is uniform, so that every budget is covered."""
    generator = np.random.default_rng(seed)
    plans: dict[tuple[str, ...], None] = {(levels[0],) * num_groups: None, (levels[-1],) * num_groups: None}
    while len(plans) < count:
        share = generator.uniform()
        chosen = np.where(generator.uniform(size=num_groups) < share, levels[-1], levels[0])
        plans[tuple(chosen.tolist())] = None
    return list(plans)


def fit_surrogate(
    names: Sequence[str], levels: Sequence[str], plans: Sequence[Sequence[str]], losses: Sequence[float]
) -> dict[str, Any]:
    """Ridge regression of main effects and of pairs in one block or of one kind in neighbouring blocks.

    Penalties are chosen on plans left out of the fit; a further quarter tests the result.
    """
    high = (np.array(plans) == levels[-1]).astype(float)
    target = np.array(losses)
    pairs = [
        (first, second)
        for first, second in itertools.combinations(range(len(names)), 2)
        if names[first].split(".")[1] == names[second].split(".")[1]
        or (
            names[first].split(".")[2:] == names[second].split(".")[2:]
            and abs(int(names[first].split(".")[1]) - int(names[second].split(".")[1])) == 1
        )
    ]
    interactions = np.stack([high[:, first] * high[:, second] for first, second in pairs], axis=1)
    order = np.random.default_rng(0).permutation(len(target))
    test, tune, train = np.split(order, [len(order) // 5, 2 * len(order) // 5])

    def solve(rows: np.ndarray, main_penalty: float, pair_penalty: float) -> tuple[float, np.ndarray]:
        design = np.hstack([high[rows], interactions[rows]])
        penalty = np.concatenate([np.full(len(names), main_penalty), np.full(len(pairs), pair_penalty)])
        mean, center = target[rows].mean(), design.mean(axis=0)
        centered = design - center
        coefficients = np.linalg.solve(centered.T @ centered + np.diag(penalty), centered.T @ (target[rows] - mean))
        return float(mean - center @ coefficients), coefficients

    def error(rows: np.ndarray, fitted: tuple[float, np.ndarray]) -> float:
        predicted = fitted[0] + np.hstack([high[rows], interactions[rows]]) @ fitted[1]
        return float(np.mean((predicted - target[rows]) ** 2))

    grid = [(main, pair) for main in (0.01, 0.1, 0.3, 1, 3) for pair in (1, 3, 10, 30, 100, NO_PAIRS)]
    best = min(grid, key=lambda penalties: error(tune, solve(train, *penalties)))
    fitted = solve(np.concatenate([train, tune]), *best)
    variance = float(np.var(target[test]))
    intercept, coefficients = solve(order, *best)
    main, pair = coefficients[: len(names)], coefficients[len(names) :]
    return {
        "intercept": intercept,
        "main": {levels[0]: [0.0] * len(names), levels[-1]: main.tolist()},
        "pairs": [
            [first, levels[-1], second, levels[-1], float(value)]
            for (first, second), value in zip(pairs, pair, strict=True)
            if best[1] < NO_PAIRS
        ],
        "fit": {
            "num_plans": len(target),
            "num_held_out": len(test),
            "r2_held_out": 1 - error(test, fitted) / variance,
            "rmse_held_out": error(test, fitted) ** 0.5,
            "sd_held_out": variance**0.5,
            "penalties": best,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["zero_shot", "finetuned", "surrogate"])
    parser.add_argument("--model", required=True, help="folder of a dense checkpoint and its tokenizer")
    parser.add_argument("--text", required=True, help="plain text")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--groups", default="10", help="number of runs of blocks, or block, sublayer, projection")
    parser.add_argument(
        "--levels", nargs="+", default=("nf4", "int8"), help="formats; 4, 8 and 16 bits stand for theirs"
    )
    parser.add_argument("--rungs", type=int, nargs="+", default=(4, 8, 16))
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--validation", type=int, default=48, help="windows")
    parser.add_argument("--plans", type=int, default=400, help="of a surrogate")
    parser.add_argument("--bank", help="folder; default beside OUT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.kind == "surrogate" and (len(arguments.levels) != 2 or arguments.groups.isdigit()):
        parser.error("a surrogate is of two --levels, and of --groups block, sublayer or projection")
    bank = arguments.bank or str(arguments.out.with_suffix("")) + "-bank"
    job = Job(
        model=arguments.model,
        text=arguments.text,
        bank=bank,
        groups=arguments.groups,
        levels=by_size(tuple(str(ALIASES[int(level)]) if level.isdigit() else level for level in arguments.levels)),
        context=arguments.context,
        num_validation=arguments.validation,
        rungs=tuple(arguments.rungs) if arguments.kind == "finetuned" else (),
    )
    build_bank(job)
    names = list(job.members())
    lines = Path(f"{arguments.out}.lines")
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    measured = {(tuple(each["plan"]), each["seed"]) for each in done}
    everything = list(itertools.product(job.levels, repeat=len(names))) if arguments.kind != "surrogate" else []
    if arguments.kind == "finetuned":
        # Every fifth part's first plan again with other data orders: how far a repeat with another seed moves the loss.
        again = [(plan, seed) for seed in (1, 2, 3) for plan in everything[:: max(1, len(everything) // 5)]]
        todo: list[Any] = [each for each in [*((plan, 0) for plan in everything), *again] if each not in measured]
    elif arguments.kind == "zero_shot":
        first = min(4, len(names))
        below = len(job.levels) ** (len(names) - first)
        counts = Counter(plan[:first] for plan, _ in measured)
        todo = [head for head in itertools.product(job.levels, repeat=first) if counts[head] < below]
    else:
        wanted = random_plans(len(names), job.levels, arguments.plans, 0)
        todo = [plan for plan in wanted if (plan, 0) not in measured]
    if todo:
        shares = [todo[index :: arguments.jobs] for index in range(arguments.jobs)]
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            for future in [pool.submit(_work, arguments.kind, job, share, str(lines)) for share in shares if share]:
                future.result()
    scored = Path(f"{arguments.out}.sensitivities")
    if not scored.exists():
        scored.write_text(json.dumps(sensitivities(job)))
    write_table(arguments.kind, job, lines, json.loads(scored.read_text()), arguments.out)


def write_table(kind: str, job: Job, lines: Path, scored: dict[str, Any], out: Path) -> None:
    """The table's file, from all that was measured."""
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    first = {tuple(each["plan"]): each["losses"] for each in found if each["seed"] == 0}
    layout, members = job.layout(), job.members()
    sizes = {level: {group.name: group.packed_bytes(level, 2) for group in layout.groups} for level in job.levels}
    plans = sorted(first)
    rungs = list(next(iter(first.values())))
    repeats: dict[tuple[str, ...], list[float]] = {}
    for each in found:
        repeats.setdefault(tuple(each["plan"]), []).append(each["losses"][rungs[-1]])
    spreads = [statistics.stdev(values) for values in repeats.values() if len(values) > 1]
    table: dict[str, Any] = {
        "kind": kind,
        "groups": list(members),
        "levels": list(job.levels),
        "group_bytes": {
            level: [sum(sizes[level][name] for name in each) for each in members.values()] for level in job.levels
        },
        "fixed_bytes": layout.plan_bytes(layout.dense())
        - sum(group.packed_bytes(DENSE, 2) for group in layout.groups if group.name not in (EMBEDDINGS, HEAD)),
        "sensitivities": scored["sensitivities"],
        "meta": {
            **asdict(job),
            "model": Path(job.model).name,
            "text": Path(job.text).name,
            "bank": "",
            "sensitivity_seconds": scored["seconds"],
            "lora": LORA.model_dump(),
            "training": TRAINING.model_dump(),
            "sd_of_another_data_order": statistics.mean(spreads) if spreads else None,
        },
    }
    losses = [first[plan][rungs[-1]] for plan in plans]
    if kind == "surrogate":
        table |= fit_surrogate(list(members), job.levels, plans, losses)
        # What main effects and pairs leave unexplained is met as noise, so that a replay is no easier than the model.
        table["loss_noise"] = table["fit"]["rmse_held_out"]
    else:
        table |= {"plans": [list(plan) for plan in plans], "loss": losses}
        table["rungs"] = {step: [first[plan][step] for plan in plans] for step in rungs}
        # Trials share their seed, and the same plan with the same seed gives the same loss.
        table["loss_noise"] = 0.0
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table) + "\n")
    print(json.dumps({"out": str(out), "plans": len(plans), "lowest": min(losses), "highest": max(losses)}))


if __name__ == "__main__":
    main()
