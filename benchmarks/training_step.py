"""What padding and logits that nobody reads cost a training step and a validation pass.

    .venv/bin/python benchmarks/training_step.py tune_configs/demo_smollm2_cpu.yaml
    .venv/bin/python benchmarks/training_step.py CONFIG --set training.batch_size=64 --steps 1

A model of the configuration's shapes, unpruned, with random weights in its smallest formats and
adapters, takes the same rows in turns: as they are trained on, with logits at every token (`all
logits`), and dealt into micro-batches in the epoch's random order (`random order`, where an
optimizer batch has several). Seconds are processor seconds of one step or pass; tokens are means
over the whole training set. Prints a table and a JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qpruner.config.load import load_config
from qpruner.config.schema import RunConfig
from qpruner.data.encoding import collate, encode
from qpruner.data.losses import labelled_only, mean_loss, predicted_labels
from qpruner.data.sources import load_examples
from qpruner.estimate.step_times import small_model
from qpruner.models.loading import load_model_config, load_tokenizer, resolve_source
from qpruner.training.finetune import Share, _Batches

Rows = list[dict[str, list[int]]]
MicroBatches = list[list[int]]


def random_order(num_rows: int, size: int) -> Iterator[list[int]]:
    """Micro-batches of the first epoch's order, of which `_Batches` takes the same optimizer
    batches."""
    order = np.random.default_rng([0, 0]).permutation(num_rows).tolist()
    for start in range(0, num_rows, size):
        yield order[start : start + size]


def padded(lengths: Sequence[int], dealt: MicroBatches) -> float:
    """Tokens a row, padding included."""
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in dealt) / len(lengths)


def step(
    model: Any, rows: Rows, dealt: MicroBatches, pad_id: int, all_logits: bool = False
) -> float:
    """Forward and backward of one optimizer batch; returns its loss."""
    batches = [collate([rows[row] for row in micro_batch], pad_id) for micro_batch in dealt]
    count = sum(len(predicted_labels(batch["labels"])) for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        if all_logits:
            loss = model(**batch, num_items_in_batch=count).loss
        else:
            with labelled_only(model, batch["labels"]):
                targets = predicted_labels(batch["labels"])
                loss = model(**batch, shift_labels=targets, num_items_in_batch=count).loss
        loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def validate_with_all_logits(model: Any, rows: Rows, pad_id: int, size: int) -> float:
    """As `mean_loss` scores, which computes logits at labelled tokens only."""
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = [
        collate(ordered[start : start + size], pad_id) for start in range(0, len(rows), size)
    ]
    count = sum(len(predicted_labels(batch["labels"])) for batch in batches)
    return sum(float(model(**batch, num_items_in_batch=count).loss) for batch in batches)


def in_turns(work: dict[str, Callable[[], float]], turns: int) -> dict[str, dict[str, float]]:
    """Median processor seconds of each piece of work, and what it returned."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    losses = {}
    for turn in range(turns + 1):
        for name, run in work.items():
            started = time.process_time()
            losses[name] = run()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - started)
    return {
        name: {"seconds": statistics.median(taken), "loss": losses[name]}
        for name, taken in seconds.items()
    }


def measure(config: RunConfig, steps: int, turns: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(resolve_source(config.model.source, "model.source"), config.model)
    settings, pad_id = config.training, int(tokenizer.pad_token_id)
    train, validation = (
        encode(load_examples(sources, key), tokenizer, config.data.max_length, config.data.template)
        for sources, key in (
            (config.data.train, "data.train"),
            (config.data.validation, "data.validation"),
        )
    )
    lengths = [len(row["input_ids"]) for row in train]
    sorted_, random = (
        list(_Batches(lengths, settings, 0, Share(0, 1))),
        list(random_order(len(train), settings.micro_batch_size)),
    )
    model_config = load_model_config(config.model)
    model = small_model(config, model_config, int(model_config.num_hidden_layers))
    each = settings.batch_size // settings.micro_batch_size
    work: dict[str, Callable[[], float]] = {}
    for number in range(steps):
        here = slice(number * each, (number + 1) * each)
        work[f"step {number}"] = lambda here=here: step(model.train(), train, sorted_[here], pad_id)
        work[f"step {number}, all logits"] = lambda here=here: step(
            model.train(), train, sorted_[here], pad_id, True
        )
        if each > 1:
            work[f"step {number}, random order"] = lambda here=here: step(
                model.train(), train, random[here], pad_id
            )
    size = config.evaluate.batch_size
    work["validation"] = lambda: mean_loss(model, validation, pad_id, size).mean
    work["validation, all logits"] = lambda: validate_with_all_logits(
        model, validation, pad_id, size
    )
    tokens = {
        "mean": float(np.mean(lengths)),
        "padded": padded(lengths, sorted_),
        "random order": padded(lengths, random),
    }
    return {"tokens": tokens, **in_turns(work, turns)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that are timed")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    found = measure(load_config(arguments.config, arguments.set), arguments.steps, arguments.turns)
    for name, values in found.items():
        print(f"{name:24}", ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
