"""No file of `tune_configs/` warns about itself, neither by its keys alone nor with the model and rows it is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from qpruner.config import load_config, validate_config
from qpruner.preflight import inspect

FOLDER = Path(__file__).parent.parent / "tune_configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
DEMO = FOLDER / "demo_smollm2_cpu.yaml"
LLAMA_7B = ("llama", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000})
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "Qwen/Qwen3-8B": (
        "qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
        },
    ),
}
"""Family and sizes of hub models; of others those of Llama-2-7B are taken."""
NUM_ROWS = 8000
"""Of a stand-in for a hub's data set: more than the recipes leave out for validation and confirmation."""


def is_on_hub(source: str) -> bool:
    return not source.startswith("package:") and Path(source).suffix not in (".jsonl", ".json", ".gguf")


def stand_in_model(source: str, tokenizer_of: Path, folder: Path) -> str:
    """A folder with the config of the hub's model, another model's tokenizer and weights."""
    family, sizes = SHAPES.get(source, LLAMA_7B)
    AutoConfig.for_model(family, **sizes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):  # weights are not read
        shutil.copy(tokenizer_of / name, folder)
    return str(folder)


def with_stand_ins(value: Any, rows: Path) -> Any:
    """The configuration with a local file in place of each of a hub's data sets."""
    if isinstance(value, list):
        return [with_stand_ins(each, rows) for each in value]
    if not isinstance(value, dict):
        return value
    if "split" in value and is_on_hub(value["source"]):
        kept = {key: value[key] for key in ("format", "split", "limit") if key in value}
        return {"source": str(rows), **kept, "split": value["split"].replace("validation", "train")}
    return {key: with_stand_ins(each, rows) for key, each in value.items()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are instructions and texts; one in ten is cut by the recipes, as of cleaned Alpaca."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"

    def row(number: int) -> dict[str, str]:
        answer = f"{number}: " + "A sentence of the answer says this and that. " * (25 if number % 10 == 0 else 6)
        return {"instruction": f"Say {number}.", "input": "", "output": answer, "text": answer}

    made = map(row, range(NUM_ROWS))
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_key_of_a_file_is_without_effect(path: Path) -> None:
    assert load_config(path).warnings == ()


def test_the_demo_warns_of_nothing(tmp_path: Path) -> None:
    """With its own model and rows, on a machine with any device."""
    assert inspect(load_config(DEMO, [f"output={tmp_path / 'run'}"]), works_here=False).warnings == ()


@pytest.mark.parametrize(
    "path", [path for path in FILES if path != DEMO], ids=lambda path: str(path.relative_to(FOLDER))
)
def test_a_recipe_warns_of_nothing(path: Path, rows: Path, tiny_model: Path, tmp_path: Path) -> None:
    """With its model's shape and rows of a usual length; its test tasks, which are on a hub, are left to it."""
    raw = with_stand_ins(yaml.safe_load(path.read_text()), rows)
    raw["output"] = str(tmp_path / "run")
    if is_on_hub(raw["model"]["source"]):
        raw["model"]["source"] = stand_in_model(raw["model"]["source"], tiny_model, tmp_path / "model")
    raw["evaluate"] |= {"tasks": ["qpruner_everyday_test"], "include_path": "package:qpruner/demo/tasks"}
    assert inspect(validate_config(raw), works_here=False).warnings == ()
