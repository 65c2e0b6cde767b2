"""Time a few real steps on this device: training, scoring and packing of the model's own shapes.

The blocks have random weights, packed as the plans' are, and adapters; embeddings and head are whole. A model of one
block and one of five tell what a block costs and what the rest does; no weight of the model is read.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qpruner.config.schema import LoraConfig, RunConfig
from qpruner.data.encoding import IGNORED_LABEL
from qpruner.data.losses import token_losses
from qpruner.models import cpu, ragged
from qpruner.models.families import family_of
from qpruner.models.layout import group_linears
from qpruner.models.loading import device
from qpruner.models.memory import release
from qpruner.plans.plan import FULL_BITS, LinearShape
from qpruner.quantization.assembly import attach_adapters
from qpruner.quantization.bank import build_entry
from qpruner.quantization.mixed import pack, packed_layer

FEW, MORE = 1, 5
"""Blocks of the two models."""
REPEATS = 3
LARGEST = 1024
"""Rows and columns, at most, of the layer whose packing is timed."""
SVD_OPERATIONS = 150
"""Operations a weight, for packing and a randomized SVD of rank 8."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one micro-batch forward and backward, and forward alone, and the operations a second of packing."""

    training: float
    scoring: float
    packing_rate: float


def measure(
    config: RunConfig, model_config: Any, linear: LinearShape, share_high: float, share_labelled: float, threads: int
) -> StepTimes:
    """Time a micro-batch of rows of full length, and the packing of a layer of `LARGEST` rows and columns at most.

    A share of the pruned model's weights is at the highest bits, the others at the lowest. A share of the tokens has a
    label, to which the head is applied.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    levels = config.quantize.bits
    rows, length = config.training.micro_batch_size, config.data.max_length
    ids = torch.randint(0, int(model_config.vocab_size), (rows, length), device=device())
    labels = ids.clone()
    labels[:, : round(length * (1 - share_labelled))] = IGNORED_LABEL
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    low, high = (_whole_model(config, model_config, batch, bits) for bits in (levels[0], levels[-1]))
    training, scoring = ((1 - share_high) * less + share_high * more for less, more in zip(low, high, strict=True))
    return StepTimes(training, scoring, _packing_rate(config, linear))


def packing_operations(rows: int, columns: int, lora: LoraConfig, num_levels: int) -> float:
    """Count the operations of packing a layer at so many bit-widths."""
    by_weight = 10 * min(rows, columns) if _is_exact(lora) else SVD_OPERATIONS
    return float(num_levels * lora.loftq_iterations * by_weight * rows * columns)


def _packing_rate(config: RunConfig, linear: LinearShape) -> float:
    # Far slower than products: 2 of a core's 100 GFLOP/s with AVX2.
    levels = [bits for bits in config.quantize.bits if bits != FULL_BITS]
    if not levels:
        return 1.0  # nothing is packed
    lora = config.lora.model_copy(update={"loftq_iterations": 1})  # all count alike
    most = LARGEST // (2 if _is_exact(lora) else 1)
    rows, columns = min(linear.rows, most), min(linear.columns, most)
    weight = torch.randn(rows, columns, device=device()).to(getattr(torch, config.model.dtype))
    double_quant, seed = config.quantize.double_quant, config.seed
    seconds = _least(lambda: [build_entry({"": weight}, bits, lora, double_quant, seed) for bits in levels])
    return packing_operations(rows, columns, lora, len(levels)) / seconds


def _is_exact(lora: LoraConfig) -> bool:
    return lora.init == "loftq" and lora.svd == "exact"


def _whole_model(
    config: RunConfig, model_config: Any, batch: dict[str, torch.Tensor], bits: int
) -> tuple[float, float]:
    """Return the seconds of training and of scoring with every group at some bits, from the two small models."""
    blocks = int(model_config.num_hidden_layers)
    few, more = min(FEW, blocks), min(MORE, blocks)
    timed = {}
    for count in {few, more}:
        timed[count] = _timed(_small_model(config, model_config, count, bits), batch)
        release()
    each = [max(0.0, most - less) / max(1, more - few) for less, most in zip(timed[few], timed[more], strict=True)]
    training, scoring = (most + (blocks - more) * block for most, block in zip(timed[more], each, strict=True))
    return training, scoring


def _timed(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    # As the Trainer runs it.
    mixed = torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else contextlib.nullcontext()

    def train() -> None:
        with mixed:
            loss = token_losses(model, batch).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    def score() -> None:
        model.eval()
        with torch.no_grad():
            float(token_losses(model, batch).sum())

    return _least(train), _least(score)


def _least(work: Callable[[], object]) -> float:
    """Time some work: the least of a few tries, since what else the machine does only adds."""
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    taken = []
    for _ in range(1 + REPEATS):
        wait()
        started = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])  # the first warms up


def _small_model(config: RunConfig, model_config: Any, num_blocks: int, bits: int) -> Any:
    """Build blocks from the middle of the model, whose widths are neither the first's nor the last's."""
    from transformers import AutoModelForCausalLM

    ragged.install(family_of(model_config))
    cpu.install()
    small = copy.deepcopy(model_config)
    first = (int(small.num_hidden_layers) - num_blocks) // 2
    ragged.keep_blocks(small, range(first, first + num_blocks))
    quantize, dtype = config.quantize, getattr(torch, config.model.dtype)
    with torch.device(device()):
        model: Any = AutoModelForCausalLM.from_config(small, dtype=dtype)
    if bits != FULL_BITS:
        for paths in group_linears(small, quantize.group).values():
            for path in paths:
                linear = model.get_submodule(path)
                tensors = pack(linear.weight.data, bits, quantize.double_quant)
                model.set_submodule(path, packed_layer(linear, bits, tensors, dtype, quantize.double_quant))
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
    adapted: Any = attach_adapters(model, {}, config.lora, quantize.group, config.seed)
    if config.training.gradient_checkpointing:
        adapted.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted.train()
