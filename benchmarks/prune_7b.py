"""Prune a Llama-2-7B-shaped random model by 20 %, and say what it took.

    # first-order Taylor without compensation, as LLM-Pruner does it
    .venv/bin/python benchmarks/prune_7b.py
    # what `rate: 0.2` alone means
    .venv/bin/python benchmarks/prune_7b.py --default

13.5 GB of random bf16 weights are made here and written as a checkpoint of files of at most 10 GB,
as Llama-2-7B's is, which is then loaded, cut on 10 samples of 64 tokens, saved and loaded again, by
the functions that `qpruner prune` calls. Resident memory must stay below 22 GiB (LLM-Pruner holds
weights and gradients of everything); it includes pages of weight files that are mapped. Prints
peaks and seconds of each step, then one JSON line. Takes 27 GB of disk.
"""

import json
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import command_line
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import Samples
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import load_dense
from qpruner.models.memory import copy_weights, release
from qpruner.pruning.prune import Pruned, num_parameters, prune

LIMIT_BYTES = 22 * 1024**3


class Peak:
    """The highest resident memory of this process, read off /proc four times a second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self.bytes = max(self.bytes, resident_bytes())

    def take(self) -> int:
        """The peak since the last call."""
        peak = max(self.bytes, resident_bytes())
        self.bytes = 0
        return peak


def resident_bytes() -> int:
    """Resident memory of this process."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


def llama_7b(num_layers: int = 32) -> LlamaConfig:
    """Llama-2-7B's shapes."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )


def random_llama(config: LlamaConfig, device: str = "cpu") -> LlamaForCausalLM:
    """A model made on its device: bf16, weights of transformers' own size (0.02)."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    # `to_empty` leaves the rotary frequencies unset: they are no weights, and are made anew.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A checkpoint has one."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})), pad_token="a")  # noqa: S106


class Steps:
    """Seconds and peaks of what is done one after the other."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []
        self._peak = Peak()
        self._started = time.monotonic()

    def end(self, name: str) -> None:
        """Of a step, and begin the next."""
        peak = self._peak.take() / 1024**3
        seconds = time.monotonic() - self._started
        self._started = time.monotonic()
        self.figures.append({"step": name, "seconds": seconds, "peak_gib": peak})
        print(f"{name:6} {seconds:7.1f} s  peak {peak:.2f} GiB", flush=True)


def prune_folder(base: Path, folder: Path, settings: PruneConfig, steps: Steps) -> Pruned:
    """Load, cut and save, as the stage does; returns the cut without its model."""
    rows = torch.randint(3, 32000, (10, 64), generator=torch.Generator().manual_seed(1)).tolist()
    model = load_dense(str(base), "bfloat16")
    copy_weights(model)
    steps.end("load")
    pruned = prune(
        model, settings, Samples([{"input_ids": row, "labels": row} for row in rows], 0, 10)
    )
    steps.end("cut")
    save_checkpoint(pruned.model, tokenizer(), folder)
    steps.end("save")
    return replace(pruned, model=None)


def main() -> None:
    """Build, load, prune, save, load; print the peak of each."""
    parser = command_line(__doc__)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--num-layers", type=int, default=32)
    parser.add_argument(
        "--default", action="store_true", help="of the prune section's keys give the rate alone"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys of the prune section"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        help="make the folders of weights here; else where temporary files go",
    )
    arguments = parser.parse_args()
    keys = {} if arguments.default else {"importance": "taylor", "compensation": "none"}
    settings = PruneConfig(
        rate=arguments.rate, **keys | dict(each.split("=", 1) for each in arguments.set)
    )
    steps = Steps()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        base = Path(scratch, "base")
        folder = Path(scratch, "pruned")
        random_llama(llama_7b(arguments.num_layers)).save_pretrained(base, max_shard_size="10GB")
        steps.end("build")
        pruned = prune_folder(base, folder, settings, steps)
        release()
        model = load_dense(str(folder), "bfloat16")
        copy_weights(model)
        steps.end("reload")
        assert num_parameters(model) == pruned.parameters_after
    highest = max(figure["peak_gib"] for figure in steps.figures)
    print(
        json.dumps(
            {
                "settings": settings.model_dump(exclude_defaults=True),
                "dropped_blocks": pruned.dropped_blocks,
                "parameters_before": pruned.parameters_before,
                "parameters_after": pruned.parameters_after,
                "steps": steps.figures,
                "peak_gib": highest,
                "below_22_gib": highest * 1024**3 < LIMIT_BYTES,
            }
        )
    )


if __name__ == "__main__":
    main()
