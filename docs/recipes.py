"""Writes into the headers of `tune_configs/` what each of their commands takes: `python
docs/recipes.py`.

Under every `# Command:` of a recipe for GPUs a line `# Memory:` has the peak of each kind of work,
as `qpruner check` counts it, and the smallest card that it fits. Shapes alone decide it: neither
weights nor rows are read.
"""

import itertools
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from qpruner import estimate
from qpruner.config.load import load_config
from qpruner.config.schema import RunConfig
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import Rows
from qpruner.pipeline.shapes import GIB, expected_shapes

FOLDER = Path(__file__).resolve().parent.parent / "tune_configs"
COMMAND, MEMORY = "# Command:", "# Memory:"
CARDS = (8, 16, 24, 40, 48, 80)
"""GiB of memory that cards have."""
USABLE = 0.9
"""Of a card: the rest is CUDA's own, and what allocation loses."""


def shapes() -> dict[str, PretrainedConfig]:
    """The models' configurations by hub id, without the hub."""
    llama = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    }
    return {
        "meta-llama/Llama-2-7b-hf": LlamaConfig(
            **llama, intermediate_size=11008, num_hidden_layers=32
        ),
        "Qwen/Qwen3-8B": Qwen3Config(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False
        ),
        "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
        ),
    }  # fmt: skip


def overrides_of(line: str) -> list[str]:
    """The `--set` options of a `# Command:` line."""
    words = shlex.split(line.partition("      (")[0])
    return [value for option, value in itertools.pairwise(words) if option == "--set"]


def peaks(config: RunConfig) -> dict[str, int]:
    """Bytes at the highest point of each kind of work."""
    shape = shapes()[config.model.source]
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        save_file({"none": torch.zeros(1)}, f"{folder}/model.safetensors")
        local = config.model.model_copy(update={"source": folder})
        config_here = config.model_copy(update={"model": local})
        found = expected_shapes(config_here, on_gpu=True, packs=True)
    inspection = Inspection(found, Rows({}, {}, {}, {}, ()))
    return {name: work(config, inspection).total for name, work in estimate.works(config).items()}


def memory_line(found: dict[str, int]) -> str:
    """The header's line for the peaks of a command."""
    parts = ", ".join(
        f"{name.removeprefix('trial, ')} {size / 1e9:.1f} GB" for name, size in found.items()
    )
    card = next((size for size in CARDS if max(found.values()) <= USABLE * size * GIB), None)
    return f"{MEMORY}   {parts}: {f'fits a GPU with {card} GiB' if card else 'fits no single GPU'}"


def renewed(path: Path) -> str:
    """A recipe with its memory lines as they are now."""
    lines = path.read_text().splitlines()
    for position, line in enumerate(lines):
        if line.startswith(COMMAND) and lines[position + 1].startswith(MEMORY):
            lines[position + 1] = memory_line(peaks(load_config(path, overrides_of(line))))
    return "\n".join(lines) + "\n"


def recipes() -> Iterator[Path]:
    """Those whose headers tell of memory."""
    return (path for path in sorted(FOLDER.rglob("*.yaml")) if MEMORY in path.read_text())


if __name__ == "__main__":
    for recipe in recipes():
        recipe.write_text(renewed(recipe))
