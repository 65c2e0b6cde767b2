"""Where a run keeps its rows, its models and its banks."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import RunConfig
from qpruner.models.loading import checkpoint_config
from qpruner.plans.plan import OUTSIDE_BLOCKS, UNPRUNED
from qpruner.quantization.formats import format_of
from qpruner.runs.records import PrepareRecord, PruneRecord, Results, digest_of
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import fetch, fetch_file

if TYPE_CHECKING:
    from qpruner.plans.plan import PrecisionPlan
    from qpruner.quantization.bank import BankSource
    from qpruner.quantization.tuned import TunedPlan


@dataclass(frozen=True)
class Places:
    """The folders of a run that its records describe."""

    config: RunConfig
    run_dir: RunDir
    records: Results

    @property
    def data(self) -> Path:
        """Folder of the encoded rows, with a subfolder for each split; read by `load_encoded`."""
        return self.run_dir.stage("prepare") / "data"

    def model_folder(self, cut: str) -> Path:
        """Return the folder of a cut's model and tokenizer, where the run keeps it."""
        if cut == UNPRUNED:
            return self.run_dir.base_model(self.records.get(PrepareRecord))
        return self.run_dir.cut(cut)

    def checkpoint_of(self, cut: str) -> Path:
        """Return the folder of a cut's model and tokenizer, fetched to this machine."""
        return fetch(self.model_folder(cut))

    def config_of(self, cut: str) -> Any:
        """Read the transformers config of a pruned model."""
        with tempfile.TemporaryDirectory() as here:
            fetch_file(self.run_dir.cut(cut) / "config.json", Path(here) / "config.json")
            return checkpoint_config(Path(here))

    def bank_of(self, cut: str) -> BankSource:
        """Describe the bank of a cut.

        Its entries depend on all that `inputs` is a digest of, and on their formats.
        """
        from qpruner.quantization.bank import VERSION, BankSource

        config = self.config
        quantize = config.quantize
        made = self.records.get(PruneRecord).cuts[cut]
        uses_grams = quantize.uses_grams
        calibration: tuple[Any, ...] = ()
        if uses_grams:
            calibration = (config.calibration, self.records.get(PrepareRecord).digest)
        inputs = digest_of(
            cut,
            made.digest,
            made.weights,
            quantize.group,
            "gptq" if uses_grams else "nearest",
            calibration,
            config.lora.model_copy(update={"dropout": 0.0}),
            config.training.method,
            config.seed,
            VERSION,
        )
        return BankSource(
            folder=self.run_dir.bank(cut),
            checkpoint=self.model_folder(cut),
            grouping=quantize.group,
            dtype=config.model.dtype,
            lora=config.lora,
            seed=config.seed,
            inputs=inputs,
            uses_grams=uses_grams,
            method=config.training.method,
        )

    def tuned_of(self, plan: PrecisionPlan) -> TunedPlan | None:
        """Describe the tuned rounding of a plan; return None if nothing of it is tuned."""
        from qpruner.quantization.tuned import VERSION, TunedPlan, is_tunable

        quantize = self.config.quantize
        formats = plan.as_dict()
        in_blocks = {name for group, name in formats.items() if group not in OUTSIDE_BLOCKS}
        if quantize.rounding != "tuned" or not any(
            is_tunable(format_of(name)) for name in in_blocks
        ):
            return None
        bank = self.bank_of(plan.cut)
        digest = digest_of(
            bank.inputs,
            bank.digests(formats.values()),
            formats,
            quantize.tuning,
            self.records.get(PrepareRecord).digest,
            VERSION,
        )
        return TunedPlan(
            bank=bank,
            plan=formats,
            folder=self.run_dir.tuned / digest,
            digest=digest,
            data=self.data,
            settings=quantize.tuning,
        )
