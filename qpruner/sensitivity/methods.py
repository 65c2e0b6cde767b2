"""Compute sensitivities: every method predicts how much each (group, bits) raises the loss of the pruned model.

Methods that need the same passes over the samples share them; their records name the other methods.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import EXPANSION, MEASUREMENT, SensitivityConfig
from qpruner.data.calibration import OnProgress, Samples
from qpruner.models.layout import group_linears
from qpruner.plans.plan import FULL_BITS
from qpruner.quantization.bank import Starts
from qpruner.runs.records import MethodScores
from qpruner.runs.storage import fetch
from qpruner.sensitivity import mutual_information
from qpruner.sensitivity.expansion import expand
from qpruner.sensitivity.measurement import Measurement, measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ByBits = dict[int, tuple[float, ...]]
SOURCES = {
    "mutual_information": "mutual information of the group's output with the predicted token (QPruner, Findings of "
    "NAACL 2025), scaled linearly from 0 at the most bits to 1 at the fewest",
    "first_order": "gradient times quantization error, summed over the weights",
    "fisher": "half the mean squared gradient times squared quantization error, summed over the weights",
    "second_order": "first order plus Fisher: second-order expansion of the loss, with squared gradients as curvature",
    "kl": "KL divergence between the predictions of the model with one group quantized and of the unquantized model",
    "loss": "measured change of the loss when one group is quantized",
}


@dataclass(frozen=True)
class Subject:
    """Samples, `quantize.group` and bank to score; `levels` are rising bit-widths, `scaling` LoRA's alpha / rank."""

    samples: Samples
    levels: tuple[int, ...]
    group: str
    bank: Path
    scaling: float
    on_group: OnProgress = lambda done, total: None
    """Counts the groups that `by_information` has scored after its pass over the samples."""

    def starts(self, model: PreTrainedModel) -> Starts:
        """Open the bank to read the initial weights of the model's groups."""
        return Starts(self.bank, group_linears(model.config, self.group), self.levels, self.scaling)


def by_information(
    model: PreTrainedModel, subject: Subject, settings: SensitivityConfig, seed: int
) -> dict[str, MethodScores]:
    """Score all groups by mutual information, estimated from the outputs of one forward pass."""
    started = time.monotonic()
    found = mutual_information.measure(model, subject.samples, subject.group, settings, seed, subject.on_group)
    lowest, highest = subject.levels[0], subject.levels[-1]
    values = {
        bits: tuple(value * (highest - bits) / (highest - lowest) for value in found.values) for bits in subject.levels
    }
    details = {"estimator": mutual_information.ESTIMATOR, "bias": mutual_information.BIAS, **vars(found)}
    return _scores({"mutual_information": (values, details)}, time.monotonic() - started, "nats of information")


def by_expansion(model: PreTrainedModel, subject: Subject) -> dict[str, MethodScores]:
    """Score all groups by first order, Fisher and second order, with one forward and backward pass."""
    started = time.monotonic()
    found = expand(model, subject.samples, subject.starts(model))
    details = {"num_samples": len(subject.samples.rows), "num_positions": found.num_tokens}
    by_method = {name: (_by_bits(getattr(found, name), subject.levels), details) for name in EXPANSION}
    return _scores(by_method, time.monotonic() - started)


def by_measurement(found: Measurement, levels: tuple[int, ...], seconds: float) -> dict[str, MethodScores]:
    """Turn a measurement into scores by KL divergence and by change of the loss, with standard errors over samples."""
    by_method = {}
    for name in MEASUREMENT:
        sums = getattr(found, name)
        details = {
            "num_samples": len(found.counts),
            "num_positions": int(found.counts.sum()),
            "base_loss": float(found.mean(found.base_loss)),
            "stderr": _by_bits(found.stderr(sums), levels),
        }
        by_method[name] = (_by_bits(found.mean(sums), levels), details)
    return _scores(by_method, seconds)


def measure_subject(model: PreTrainedModel, subject: Subject) -> Measurement:
    """Measure KL divergence and change of the loss for every (group, bits) on the samples of `subject`."""
    return measure(model, subject.samples, subject.starts(model))


def measure_share(checkpoint: Path, dtype: str, threads: int, subject: Subject) -> Measurement:
    """Load the pruned model in a worker process, and measure the samples of `subject`, a part of all samples."""
    import torch

    from qpruner.models.loading import load_dense

    torch.set_num_threads(threads)
    return measure_subject(load_dense(str(fetch(checkpoint)), dtype), subject)


def _scores(
    by_method: Mapping[str, tuple[ByBits, dict[str, Any]]], seconds: float, unit: str = "nats per predicted token"
) -> dict[str, MethodScores]:
    """Make one record per method from values and details; the methods share the time `seconds`."""
    found = {}
    for name, (values, details) in by_method.items():
        if others := [other for other in by_method if other != name]:
            details = details | {"shared_with": others}
        found[name] = MethodScores(unit=unit, source=SOURCES[name], values=values, seconds=seconds, details=details)
    return found


def _by_bits(values: Any, levels: tuple[int, ...]) -> ByBits:
    """Map bits to the rows of `values` ``(levels below 16, groups)``, and 16 bits to zeros."""
    found = {bits: tuple(row.tolist()) for bits, row in zip(levels, values, strict=False)}
    return found | ({FULL_BITS: (0.0,) * values.shape[1]} if FULL_BITS in levels else {})
