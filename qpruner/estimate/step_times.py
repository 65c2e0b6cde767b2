"""Time a few real steps of training and scoring on this device, with the shapes of the model.

Models of one and of five blocks, with adapters and packed random weights, give the time of a block
and of the rest.
"""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from qpruner.config.schema import RunConfig
from qpruner.data.encoding import IGNORED_LABEL
from qpruner.data.losses import token_losses
from qpruner.models import cpu, ragged
from qpruner.models.families import family_of
from qpruner.models.loading import device
from qpruner.models.memory import limit_threads, release
from qpruner.pipeline.shapes import layout_for
from qpruner.plans.plan import UNPRUNED
from qpruner.quantization.assembly import attach_adapters
from qpruner.quantization.formats import format_of, trained_by
from qpruner.quantization.mixed import packed_layer
from qpruner.quantization.scales import make_trainable

Batch = dict[str, torch.Tensor]
FEW = 1
MORE = 5
"""Numbers of blocks of the two timed models."""
REPEATS = 3


def measure(
    config: RunConfig, model_config: Any, share_labelled: float, threads: int
) -> tuple[float, float]:
    """Time training and scoring on one micro-batch of full rows.

    Args:
        config: The validated configuration.
        model_config: The config of the pruned model.
        share_labelled: The share of tokens that have a label.
        threads: CPU cores of a trial.

    Returns:
        The seconds of a forward and backward pass, and of a forward pass.
    """
    limit_threads(threads)
    rows = config.training.micro_batch_size
    length = config.data.max_length
    ids = torch.randint(0, int(model_config.vocab_size), (rows, length), device=device())
    labels = ids.clone()
    labels[:, : round(length * (1 - share_labelled))] = IGNORED_LABEL
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    blocks = int(model_config.num_hidden_layers)
    few = min(FEW, blocks)
    more = min(MORE, blocks)
    timed = {}
    for count in {few, more}:
        timed[count] = _timed(small_model(config, model_config, count), batch)
        release()

    times = []
    for less, most in zip(timed[few], timed[more], strict=True):
        of_a_block = max(0.0, most - less) / max(1, more - few)
        times.append(most + (blocks - more) * of_a_block)
    training, scoring = times
    return training, scoring


def _timed(model: Any, batch: Batch) -> tuple[float, float]:
    """Return the shortest seconds of a forward and backward pass, and of a forward pass."""

    def train() -> None:
        with _precision():
            loss = token_losses(model, batch).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    def score() -> None:
        model.eval()
        with torch.no_grad():
            float(token_losses(model, batch).sum())

    return _least(train), _least(score)


def _precision() -> AbstractContextManager[None]:
    """Compute in the precision that the Trainer uses."""
    if torch.cuda.is_available():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def _least(work: Callable[[], object]) -> float:
    """Return the shortest time of several runs: other load on the machine only adds to it."""
    taken = []
    for _ in range(1 + REPEATS):
        _wait()
        started = time.perf_counter()
        work()
        _wait()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])  # the first warms up


def _wait() -> None:
    """Wait until the GPU has done its work, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def small_model(config: RunConfig, model_config: Any, num_blocks: int) -> Any:
    """Build a model of a few middle blocks, with its blocks in their smallest formats.

    Middle blocks are taken because outer ones may be wider.
    """
    from transformers import AutoModelForCausalLM

    ragged.install(family_of(model_config))
    cpu.install()
    small = copy.deepcopy(model_config)
    first = (int(small.num_hidden_layers) - num_blocks) // 2
    ragged.keep_blocks(small, range(first, first + num_blocks))
    dtype = getattr(torch, config.model.dtype)
    with torch.device(device()):
        model: Any = AutoModelForCausalLM.from_config(small, dtype=dtype)
    layout = layout_for(config, small, torch.cuda.is_available(), UNPRUNED)
    for group, name in zip(layout.groups, layout.smallest().formats, strict=True):
        packing = format_of(name)
        if packing.is_packed and not group.is_table:
            for linear in group.linears:
                layer = model.get_submodule(linear.name)
                tensors = packing.pack(layer.weight.data)
                model.set_submodule(linear.name, packed_layer(layer, packing, tensors, dtype))
    adapted: Any = model
    if trained_by(config.training.method, layout.smallest().formats) == "scales":
        make_trainable(model)
    else:
        adapted = attach_adapters(model, {}, config.lora, config.quantize.group, config.seed)
    if config.training.gradient_checkpointing:
        adapted.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted.train()
