"""Is the pruned model faster? Tokens a second of base and pruned models, in turns in one process.

    .venv/bin/python benchmarks/pruning_speed.py                            # SmolLM2-135M in bf16:
    20 % off .venv/bin/python benchmarks/pruning_speed.py --dtype float32 .venv/bin/python
    benchmarks/pruning_speed.py --shape llama-1b           # random weights of Llama-3.2-1B's shape
    .venv/bin/python benchmarks/pruning_speed.py --models FOLDER --prepare  # only prune, to measure
    on a quiet machine .venv/bin/python benchmarks/pruning_speed.py --processor-time           # one
    thread's own, where others are busy .venv/bin/python benchmarks/pruning_speed.py --compile
    # every model by torch.compile

Decoding reads all weights for a token, so a cut that leaves a share s of the bytes that a token
reads promises 1 / s (the embedding table is not read, unless it is the head). What a step takes
however thin the layers are is measured by running it with every matrix product left out: `fixed`.
Both together say what is possible with as many blocks: base / (fixed + s (base - fixed)). A line a
model and workload, then one JSON line. Ratios are of neighbours in time, median and quartiles over
the turns; `fastest` is that of the fastest quarter of the turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pruning import SOURCE, Bench

from qpruner.config.schema import PruneConfig
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import device, load_dense, load_tokenizer, resolve_source
from qpruner.pruning.prune import Criteria, num_parameters, prune_by
from qpruner.pruning.settings import settled

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "round_to 1": {"round_to": 1},
    "round_to 32": {"round_to": 32},
    "whole blocks": {"units": ("block", "attention", "mlp")},
}
"""Name -> what it has other than the default, at 20 %."""
WORKLOADS = {
    "prefill 512": (1, 0),
    "decode 1x128": (1, 128),
    "decode 1x1024": (1, 1024),
    "decode 8x128": (8, 128),
    "decode 16x128": (16, 128),
}
"""Sequences and tokens of context; no context is a prefill."""
NUM_PREFILLED = 512
NUM_WARM_UP = 2
"""Turns that are not counted; a compiled model is compiled in both (its cache has other strides in
the second)."""
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def prepare(
    folder: Path, shape: str, recipes: Sequence[str], evaldata: Path, scratch: Path
) -> dict[str, Path]:
    """The models as checkpoints in `folder`; those that are there are taken as they are."""
    folders = {
        name: folder / shape / name.replace(" ", "-").replace(",", "")
        for name in ("base", *recipes)
    }
    missing = {name: path for name, path in folders.items() if not path.is_dir()}
    if missing:
        (_make_random if shape == "llama-1b" else _make_smollm2)(missing, evaldata, scratch)
    return folders


def _make_smollm2(folders: dict[str, Path], evaldata: Path, scratch: Path) -> None:
    bench = Bench(evaldata, scratch)
    for name, path in folders.items():
        settings = (
            PruneConfig(rate=0.2, **RECIPES[name]) if name in RECIPES else PruneConfig(rate=0.0)
        )
        save_checkpoint(bench.prune(settings, bench.texts[0]), bench.tokenizer, path)


def _make_random(folders: dict[str, Path], evaldata: Path, scratch: Path) -> None:
    """Random weights say nothing of what matters: every block loses the same share."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(resolve_source(SOURCE, "model.source"))
    for name, path in folders.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **LLAMA_1B), dtype=torch.bfloat16
        )
        keys = {"rate": 0.2, **RECIPES[name]} if name in RECIPES else {"rate": 0.0}
        settings = settled(model.config, PruneConfig(selection="per_layer", **keys))
        save_checkpoint(prune_by(Criteria(settings), model, settings).model, tokenizer, path)


def bytes_read(model: Any) -> int:
    """Return the bytes of the weights that a token reads.

    They are all but the embedding table, which counts only if it is the head.
    """
    embeddings = model.get_input_embeddings().weight
    is_head = model.get_output_embeddings().weight is embeddings
    read = num_parameters(model) - (0 if is_head else embeddings.numel())
    return read * int(embeddings.element_size())


class Clock:
    """One model at one workload: a context in its cache, and seconds a step from there.

    Args:
        model: The model.
        batch_size: Sequences.
        context: Tokens in front of the steps; 0 measures the prefill of `NUM_PREFILLED`.
        now: Seconds so far.
    """

    @torch.no_grad()
    def __init__(self, model: Any, batch_size: int, context: int, now: Callable[[], float]) -> None:
        self._model, self._context, self._now = model, context, now
        generator = torch.Generator().manual_seed(0)
        length = context or NUM_PREFILLED
        self._ids = torch.randint(
            3, model.config.vocab_size, (batch_size, length), generator=generator
        )
        self._ids = self._ids.to(model.device)
        self._output = (
            model(input_ids=self._ids, use_cache=True, logits_to_keep=1) if context else None
        )
        self.num_tokens = batch_size * (1 if context else length)

    @torch.no_grad()
    def seconds(self) -> float:
        """Of one step."""
        if self._output is None:
            return self._timed(
                lambda: self._model(input_ids=self._ids, use_cache=True, logits_to_keep=1)
            )
        cache = self._output.past_key_values
        if grown := cache.get_seq_length() - self._context:
            cache.crop(-grown)
        token = self._output.logits[:, -1:].argmax(dim=-1)
        return self._timed(lambda: self._model(input_ids=token, cache=cache, use_cache=True))

    def _timed(self, step: Callable[[], Any]) -> float:
        started = self._now()
        float(step().logits.sum())  # a GPU may be behind
        return self._now() - started


@contextmanager
def without_products() -> Iterator[None]:
    """Linear layers answer at once, with anything."""
    product = torch.nn.functional.linear

    def nothing(
        inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return inputs.new_zeros((*inputs.shape[:-1], len(weight)))

    torch.nn.functional.linear = nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.linear = product


def measure(
    models: dict[str, Any],
    workloads: Sequence[str],
    num_turns: int,
    now: Callable[[], float],
    compiled: bool,
) -> list[dict[str, Any]]:
    """Every model at every workload, in turns; the first `NUM_WARM_UP` are not counted.

    Compiled models are not run without their products: those would be other programs.
    """
    shares = {
        name: bytes_read(model) / bytes_read(models["base"]) for name, model in models.items()
    }
    rows = []
    for workload in workloads:
        clocks = {name: Clock(model, *WORKLOADS[workload], now) for name, model in models.items()}
        seen: dict[str, list[float]] = {name: [] for name in models}
        fixed = []
        for turn in range(NUM_WARM_UP + num_turns):
            for name, clock in clocks.items():
                seconds = clock.seconds()
                if turn >= NUM_WARM_UP:
                    seen[name].append(seconds)
            if not compiled and turn >= NUM_WARM_UP:
                with without_products():
                    fixed.append(clocks["base"].seconds())
        base = statistics.median(seen["base"])
        for name, share in shares.items():
            ratios = sorted(a / b for a, b in zip(seen["base"], seen[name], strict=True))
            seconds = statistics.median(seen[name])
            row = {
                "workload": workload,
                "model": name,
                "removed": 1 - num_parameters(models[name]) / num_parameters(models["base"]),
                "promised": 1 / share,
                "milliseconds": 1000 * seconds,
                "tokens_per_second": clocks[name].num_tokens / seconds,
                "ratio": statistics.median(ratios),
                "quartiles": statistics.quantiles(ratios, n=4)[::2],
                "fastest": _fastest(seen["base"]) / _fastest(seen[name]),
            }
            told = ""
            if fixed:
                overhead = statistics.median(fixed)
                row |= {
                    "possible": base / (overhead + share * (base - overhead)),
                    "fixed_share": overhead / base,
                }
                told = f"; possible {row['possible']:.3f}, fixed {row['fixed_share']:.0%}"
            rows.append(row)
            print(
                f"{row['workload']:16} {name:18} removed {row['removed']:.3f} "
                f"promised {row['promised']:.3f}: "
                f"{row['tokens_per_second']:8.1f} tokens/s {row['milliseconds']:7.1f} ms a step "
                f"{row['ratio']:.3f} x base "
                f"({row['quartiles'][0]:.3f}-{row['quartiles'][1]:.3f}), "
                f"fastest {row['fastest']:.3f}{told}",
                flush=True,
            )
    return rows


def _fastest(seconds: list[float]) -> float:
    """The mean of the fastest quarter: what others that use the machine leave alone."""
    return statistics.mean(sorted(seconds)[: max(len(seconds) // 4, 1)])


def main() -> None:
    """Prune what is not there yet, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("smollm2-135m", "llama-1b"), default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument(
        "--compile", action="store_true", help="the first turn compiles: minutes a model"
    )
    parser.add_argument(
        "--models", type=Path, help="keep the checkpoints here, and take those that are there"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="make the checkpoints and measure nothing"
    )
    parser.add_argument("--evaldata", type=Path, default=Path("../shared/evaldata"))
    parser.add_argument(
        "--scratch", type=Path, help="as in pruning.py: importance that is known already"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = arguments.models or Path(name), arguments.scratch or Path(name)
        folders = prepare(folder, arguments.shape, arguments.recipes, arguments.evaldata, scratch)
        if arguments.prepare:
            return
        models = {
            name: load_dense(str(path), arguments.dtype).eval() for name, path in folders.items()
        }
        if arguments.processor_time:
            torch.set_num_threads(1)
        if arguments.compile:
            for model in models.values():
                model.forward = torch.compile(model.forward)
        now = time.thread_time if arguments.processor_time else time.perf_counter
        rows = measure(models, arguments.workloads, arguments.turns, now, arguments.compile)
    told = {
        "device": device(),
        "threads": torch.get_num_threads(),
        "processor_time": arguments.processor_time,
    }
    told |= {"shape": arguments.shape, "compiled": arguments.compile, "dtype": arguments.dtype}
    print(json.dumps(told | {"rows": rows}))


if __name__ == "__main__":
    main()
