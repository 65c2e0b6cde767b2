"""Prune a Llama-2-7B-shaped random model by 20 %, and say what it took.

    .venv/bin/python benchmarks/prune_7b.py [--save] [--set compensation=least_squares]

The model is 13.5 GB of random bf16 weights, made here; first-order Taylor on 10 samples of 64 tokens, as LLM-Pruner
takes, unless `--set` says otherwise. Resident memory must stay below 22 GiB (LLM-Pruner holds weights and gradients of
everything).
Prints peak and seconds of each step, then one JSON line. Long: `pytest -m slow` runs it, the fast tests do not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qpruner.calibration import Samples
from qpruner.config import PruneConfig
from qpruner.pruning.prune import prune

LIMIT_BYTES = 22 * 1024**3


class Peak:
    """The highest resident memory of this process, read off /proc four times a second."""

    def __init__(self) -> None:
        self.bytes, self._stop = 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self.bytes = max(self.bytes, resident_bytes())

    def take(self) -> int:
        """The peak since the last call."""
        peak, self.bytes = max(self.bytes, resident_bytes()), 0
        return peak


def resident_bytes() -> int:
    """Resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def random_llama(num_layers: int) -> LlamaForCausalLM:
    """Llama-2-7B's shapes, bf16, weights of transformers' own size (0.02)."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    # `to_empty` leaves the rotary frequencies unset: they are no weights, and are made anew.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)
    return model.eval()


def main() -> None:
    """Build, prune, save; print the peak of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--num-layers", type=int, default=32)
    parser.add_argument("--save", action="store_true", help="write the pruned checkpoint to a temporary folder, too")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys of the prune section")
    arguments = parser.parse_args()
    keys = {"importance": "taylor", "compensation": "none"} | dict(each.split("=", 1) for each in arguments.set)
    settings = PruneConfig(rate=arguments.rate, **keys)
    peak, figures = Peak(), {}

    def step(name: str, started: float) -> None:
        figures[name] = {"seconds": time.monotonic() - started, "peak_gib": peak.take() / 1024**3}
        print(f"{name:6} {figures[name]['seconds']:7.1f} s  peak {figures[name]['peak_gib']:.2f} GiB", flush=True)

    started = time.monotonic()
    model = random_llama(arguments.num_layers)
    step("build", started)
    ids = torch.randint(3, 32000, (10, 64), generator=torch.Generator().manual_seed(1)).tolist()
    started = time.monotonic()
    pruned = prune(model, settings, Samples([{"input_ids": row, "labels": row} for row in ids], 0, 10))
    step("prune", started)
    if arguments.save:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            pruned.model.save_pretrained(folder)
            step("save", started)
    highest = max(figure["peak_gib"] for figure in figures.values())
    print(
        json.dumps(
            {
                "settings": settings.model_dump(exclude_defaults=True),
                "parameters_before": pruned.parameters_before,
                "parameters_after": pruned.parameters_after,
                "steps": figures,
                "peak_gib": highest,
                "below_22_gib": highest * 1024**3 < LIMIT_BYTES,
            }
        )
    )


if __name__ == "__main__":
    main()
