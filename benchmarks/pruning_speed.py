"""Is a pruned model faster? Tokens a second of SmolLM2-135M and its cuts, in turns in one process.

    .venv/bin/python benchmarks/pruning_speed.py                   # 20 % off, in bf16
    .venv/bin/python benchmarks/pruning_speed.py --dtype float32

Decoding reads all weights for a token, so a cut that leaves a share s of the bytes that a token
reads promises a speed of 1 / s. The embedding table is not read, unless it is the head. Prints a
line for each model and workload, then one JSON line. Ratios are those of neighbours in time: their
median and quartiles over the turns.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import command_line, in_turns
from pruning import SAME_TEXT, Bench

from qpruner.config.schema import PruneConfig
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import device, load_dense
from qpruner.pruning.prune import num_parameters

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "whole blocks": {"units": ("block", "attention", "mlp")},
}
"""Name -> what it has other than the default, at 20 %."""
WORKLOADS = {"prefill 512": (1, 0), "decode 1x128": (1, 128), "decode 16x128": (16, 128)}
"""Sequences and tokens of context; no context is a prefill."""
NUM_PREFILLED = 512
NUM_WARM_UP = 2


def made_models(folder: Path, recipes: list[str], evaldata: Path, dtype: str) -> dict[str, Any]:
    """Return the base model and its cuts, loaded from checkpoints as a server would."""
    bench = Bench(evaldata)
    models = {}
    for name in ("base", *recipes):
        keys = {"rate": 0.2, **RECIPES[name]} if name in RECIPES else {"rate": 0.0}
        save_checkpoint(bench.prune(PruneConfig(**keys), SAME_TEXT), bench.tokenizer, folder / name)
        models[name] = load_dense(str(folder / name), dtype).eval()
    return models


def bytes_read(model: Any) -> int:
    """Count the bytes of the weights that a token reads."""
    embeddings = model.get_input_embeddings().weight
    read = num_parameters(model)
    if model.get_output_embeddings().weight is not embeddings:
        read -= embeddings.numel()
    return read * int(embeddings.element_size())


@torch.no_grad()
def step_of(model: Any, batch_size: int, context: int) -> Callable[[], float]:
    """Return a function that runs one step of a workload, and waits for the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, context or NUM_PREFILLED)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator).to(model.device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    token = output.logits[:, -1:].argmax(dim=-1)

    @torch.no_grad()
    def prefill() -> float:
        return float(model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.sum())

    @torch.no_grad()
    def decode() -> float:
        grown = cache.get_seq_length() - context
        if grown:
            cache.crop(-grown)
        return float(model(input_ids=token, cache=cache, use_cache=True).logits.sum())

    return decode if context else prefill


def measure(models: dict[str, Any], workload: str, turns: int) -> list[dict[str, Any]]:
    """Time every model at one workload."""
    batch_size, context = WORKLOADS[workload]
    steps = {name: step_of(model, batch_size, context) for name, model in models.items()}
    seconds = in_turns(steps, turns, NUM_WARM_UP)
    num_tokens = batch_size * (1 if context else NUM_PREFILLED)
    rows = []
    for name, model in models.items():
        ratios = [base / own for base, own in zip(seconds["base"], seconds[name], strict=True)]
        row = {
            "workload": workload,
            "model": name,
            "removed": 1 - num_parameters(model) / num_parameters(models["base"]),
            "promised": bytes_read(models["base"]) / bytes_read(model),
            "tokens_per_second": num_tokens / statistics.median(seconds[name]),
            "ratio": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
        low, high = row["quartiles"]
        print(
            f"{workload:16} {name:14} removed {row['removed']:.3f}, promised "
            f"{row['promised']:.3f}: {row['tokens_per_second']:8.1f} tokens/s, "
            f"{row['ratio']:.3f} x base ({low:.3f} to {high:.3f})",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    """Prune, then measure."""
    parser = command_line(__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--evaldata", type=Path, default=Path("../shared/evaldata"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = made_models(Path(folder), arguments.recipes, arguments.evaldata, arguments.dtype)
        rows = [
            row
            for workload in arguments.workloads
            for row in measure(models, workload, arguments.turns)
        ]
    setting = {"device": device(), "threads": torch.get_num_threads(), "dtype": arguments.dtype}
    print(json.dumps(setting | {"rows": rows}))


if __name__ == "__main__":
    main()
