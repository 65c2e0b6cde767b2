"""Compare formats and roundings on one model: bytes, loss after equal fine-tunes, seconds.

    .venv/bin/python benchmarks/formats.py tune_configs/demo_smollm2_cpu.yaml --steps 8 --out
    runs/formats \
        bf16 nf4 q4_0 q4_0+q8_0 w3 w3:gptq best:100e6:q4_0,q5_0,q8_0

The model is not pruned. A row is `FORMAT` for all blocks, `FORMAT+FORMAT` with a format for the
embeddings, either with `:gptq` for calibrated rounding; `best:BYTES:FORMATS` is the knapsack over
these formats, for blocks and embeddings, by the errors of the weights. Losses are those of the
configuration's validation rows and of its confirmation rows that judge, adapters rounded to 16 bits
as they are saved. One bank is built in OUT and used again.
"""

import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import append_record, command_line, print_heading, print_row

from qpruner.config.load import load_config
from qpruner.config.schema import RunConfig
from qpruner.data.calibration import Samples
from qpruner.data.encoding import load_encoded, load_scored
from qpruner.data.losses import mean_loss
from qpruner.models.layout import layout_of
from qpruner.models.loading import checkpoint_config, load_dense, load_tokenizer
from qpruner.pipeline.run import run
from qpruner.plans.plan import EMBEDDINGS, HEAD, PrecisionPlan
from qpruner.plans.space import PlanSpace
from qpruner.pruning.grams import gather
from qpruner.quantization.assembly import cast_adapters, plan_model
from qpruner.quantization.bank import BankSource, make_entries, write_grams
from qpruner.quantization.formats import format_of, formats
from qpruner.runs.records import CONFIRMATION
from qpruner.runs.run_dir import RunDir
from qpruner.search.choice import seed_plan
from qpruner.training.finetune import Listener, Schedule, finetune


class Rows:
    """The prepared base model and rows of a configuration, and banks for nearest and calibrated
    rounding."""

    def __init__(self, config: RunConfig, out: Path) -> None:
        self.config = config
        self.out = out
        self.prepared = RunDir(config.output)
        results = run(config, lambda event: None, until="prepare")
        assert results.prepare is not None
        self.model = self.prepared.base_model(results.prepare)
        self.data = self.prepared.stage("prepare") / "data"
        names = tuple(formats())
        wide = tuple(name for name in names if format_of(name).holds_embeddings)
        quantize = config.quantize.model_copy(
            update={"formats": names, "bits": None, "embeddings": wide}
        )
        self.layout = layout_of(
            checkpoint_config(self.model), quantize, 2, config.lora.rank, torch.cuda.is_available()
        )

    def plan(self, row: str) -> PrecisionPlan:
        """Return the plan of a row."""
        name, _, rest = row.partition(":")
        if name == "best":
            size, _, named = rest.removesuffix(":gptq").partition(":")
            return self._best(
                int(float(size)),
                tuple(named.split(",")),
                "gptq" if row.endswith(":gptq") else "nearest",
            )
        block, _, table = name.partition("+")
        tables = {EMBEDDINGS: table or "bf16", HEAD: table or "bf16"}
        return PrecisionPlan.from_dict(
            {group.name: tables.get(group.name, block) for group in self.layout.groups}
        )

    def _best(self, size: int, names: tuple[str, ...], rounding: str) -> PrecisionPlan:
        offered = tuple(
            replace(group, formats=tuple(name for name in group.formats if name in names))
            for group in self.layout.groups
        )
        layout = replace(self.layout, groups=offered)
        bank = self.bank(rounding, {each.name: each.formats for each in offered})

        def rise(group: Any, level: str) -> float:
            entry = (
                bank.entry(group.name, level)
                if level in group.formats and format_of(level).is_packed
                else None
            )
            return group.num_weights * entry.error if entry else 0.0

        rises = {level: [rise(each, level) for each in offered] for level in layout.levels}
        return seed_plan(rises, PlanSpace.of(layout, size))

    def bank(self, rounding: str, wanted: dict[str, tuple[str, ...]]) -> BankSource:
        """Make what a bank lacks of the wanted entries, and return it."""
        config = self.config
        gptq = rounding == "gptq"
        places = self.out / f"bank-{rounding}", self.model
        bank = BankSource(
            *places, config.quantize.group, config.model.dtype, config.lora, 0, uses_grams=gptq
        )
        if not bank.has_grams():
            self._gather(bank)
        for name, levels in wanted.items():
            packed = [
                level
                for level in levels
                if format_of(level).is_packed and not bank.entry(name, level)
            ]
            list(make_entries(bank, name, packed))
        return bank

    def _gather(self, bank: BankSource) -> None:
        model = load_dense(str(self.model), self.config.model.dtype)
        pad_id = int(load_tokenizer(str(self.model)).pad_token_id)
        samples = Samples(
            list(load_encoded(self.data / "importance")), pad_id, self.config.calibration.batch_size
        )
        for grams in gather(model, samples):
            write_grams(bank, grams)

    def measure(self, row: str, steps: int, seed: int) -> dict[str, Any]:
        """Fine-tune and score one row."""
        config = self.config
        plan = self.plan(row)
        rounding = "gptq" if row.endswith(":gptq") else "nearest"
        bank = self.bank(rounding, {group: (level,) for group, level in plan.as_dict().items()})
        started = time.monotonic()
        model = plan_model(bank, plan.as_dict(), config.seed)
        start_seconds = time.monotonic() - started
        pad_id = int(load_tokenizer(str(self.model)).pad_token_id)
        train, validation = (load_encoded(self.data / name) for name in ("train", "validation"))
        fresh = load_scored(self.data, CONFIRMATION)
        before = mean_loss(model, validation, pad_id, config.evaluate.batch_size).mean
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            schedule = Schedule(steps, rungs=(steps,))
            listener = Listener(on_rung=lambda step, checkpoint, loss: None)
            finetune(
                model, train, config.training, schedule, Path(work), seed, pad_id, listener=listener
            )
        seconds = time.monotonic() - started
        cast_adapters(model)
        return {
            "row": row,
            "plan": str(plan),
            "bytes": self.layout.plan_bytes(plan),
            "steps": steps,
            "seed": seed,
            "before": before,
            "validation": mean_loss(model, validation, pad_id, config.evaluate.batch_size).mean,
            "confirmation": mean_loss(model, fresh, pad_id, config.evaluate.batch_size).mean,
            "start_seconds": start_seconds,
            "seconds": seconds,
        }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    run_folder = f"output={args.out / 'run'}"
    rows = Rows(load_config(args.config, [run_folder, "prune.rates=[0]"]), args.out)
    figures = ("before", "validation", "confirmation")
    seconds = ("start_seconds", "seconds")
    print_heading(["row", "MB", "steps", "seed", *figures, "start s", "fine-tune s"])
    for row, steps, seed in product(args.rows, args.steps, args.seeds):
        record = rows.measure(row, steps, seed)
        append_record(args.out / "rows.jsonl", record)
        losses = [f"{record[name]:.3f}" for name in figures]
        times = [f"{record[name]:.1f}" for name in seconds]
        print_row([row, f"{record['bytes'] / 1e6:.1f}", steps, seed, *losses, *times])


if __name__ == "__main__":
    main()
