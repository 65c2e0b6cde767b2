"""Time a few real steps of training, scoring and packing on this device, with the shapes of the model.

The timed blocks have adapters and packed random weights; embeddings and head have full size. The times of a model of
one block and of a model of five blocks give the time of a block and of the rest. No weight of the model is read.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
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

Batch = dict[str, torch.Tensor]
FEW, MORE = 1, 5
"""Numbers of blocks of the two timed models."""
REPEATS = 3
LARGEST = 1024
"""Maximum rows and columns of the layer whose packing is timed."""
SVD_OPERATIONS = 150
"""Operations per weight of packing with a randomized SVD of rank 8."""


def measure(
    config: RunConfig, model_config: Any, linear: LinearShape, share_high: float, share_labelled: float, threads: int
) -> tuple[float, float, float]:
    """Time a micro-batch of rows of full length, and the packing of a layer cut to `LARGEST` rows and columns.

    Return the seconds of training and of scoring, and the operations per second of packing. `share_high` of the weights
    have the highest bits, the others the lowest. The head runs at the tokens with a label, `share_labelled` of all.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    levels = config.quantize.bits
    rows, length = config.training.micro_batch_size, config.data.max_length
    ids = torch.randint(0, int(model_config.vocab_size), (rows, length), device=device())
    labels = ids.clone()
    labels[:, : round(length * (1 - share_labelled))] = IGNORED_LABEL
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    low, high = (_extrapolate(config, model_config, batch, bits) for bits in (levels[0], levels[-1]))
    training, scoring = ((1 - share_high) * less + share_high * more for less, more in zip(low, high, strict=True))
    return training, scoring, _packing_rate(config, linear)


def packing_operations(rows: int, columns: int, lora: LoraConfig, num_levels: int) -> float:
    """Count the operations of packing a layer at `num_levels` bit-widths."""
    by_weight = 10 * min(rows, columns) if _is_exact(lora) else SVD_OPERATIONS
    return float(num_levels * lora.loftq_iterations * by_weight * rows * columns)


def _packing_rate(config: RunConfig, linear: LinearShape) -> float:
    # Packing is far slower than matrix products: 2 of a core's 100 GFLOP/s with AVX2.
    levels = [bits for bits in config.quantize.bits if bits != FULL_BITS]
    if not levels:
        return 1.0  # nothing is packed
    lora = config.lora.model_copy(update={"loftq_iterations": 1})  # all iterations cost the same
    most = LARGEST // (2 if _is_exact(lora) else 1)
    rows, columns = min(linear.rows, most), min(linear.columns, most)
    weight = torch.randn(rows, columns, device=device()).to(getattr(torch, config.model.dtype))
    settings = (lora, config.quantize.double_quant, config.seed)
    seconds = _least(lambda: [build_entry({"": weight}, bits, *settings) for bits in levels])
    return packing_operations(rows, columns, lora, len(levels)) / seconds


def _is_exact(lora: LoraConfig) -> bool:
    return lora.init == "loftq" and lora.svd == "exact"


def _extrapolate(config: RunConfig, model_config: Any, batch: Batch, bits: int) -> tuple[float, float]:
    """Estimate the seconds of training and of scoring at one bit-width from two small models."""
    blocks = int(model_config.num_hidden_layers)
    few, more = min(FEW, blocks), min(MORE, blocks)
    timed = {}
    for count in {few, more}:
        timed[count] = _timed(_small_model(config, model_config, count, bits), batch)
        release()
    each = [max(0.0, most - less) / max(1, more - few) for less, most in zip(timed[few], timed[more], strict=True)]
    training, scoring = (most + (blocks - more) * block for most, block in zip(timed[more], each, strict=True))
    return training, scoring


def _timed(model: Any, batch: Batch) -> tuple[float, float]:
    # The Trainer uses the same precision.
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
    """Return the shortest time of several runs, because other load on the machine only adds time."""
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
    """Build a small model of middle blocks, because the first and last blocks may have other widths."""
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
