"""Pruned folders: what is written is what is read, by us and by plain transformers after one import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILY_NAMES, KEPT, LAYERS, family_model, logits_of, prompt

from qpruner.config import ModelConfig
from qpruner.errors import CorruptFile, UserError
from qpruner.models.checkpoint import prepare_base, save_checkpoint
from qpruner.models.loading import load_dense, load_model_config, load_tokenizer
from qpruner.pruning.surgery import cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FRESH_PROCESS = """
import sys
from pathlib import Path
import torch
import qpruner.hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
input_ids = load_file(sys.argv[1])["input_ids"]
found = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found[Path(folder).name] = model(input_ids=input_ids, use_cache=False).logits
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def cut_models() -> dict[str, PreTrainedModel]:
    return {name: cut(family_model(name), KEPT) for name in FAMILY_NAMES}


@pytest.fixture(scope="module")
def folders(
    cut_models: dict[str, PreTrainedModel], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root, tokenizer = tmp_path_factory.mktemp("pruned"), load_tokenizer(str(tiny_model))
    for name, model in cut_models.items():
        save_checkpoint(model, tokenizer, root / name)
    return {name: root / name for name in cut_models}


@pytest.fixture(scope="module")
def fresh_logits(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits of every folder as a new Python process computes them, with `import qpruner.hf` and transformers only."""
    from safetensors.torch import save_file

    work = tmp_path_factory.mktemp("fresh")
    save_file({"input_ids": prompt()}, work / "prompt.safetensors")
    command = [sys.executable, "-c", FRESH_PROCESS, str(work / "prompt.safetensors"), str(work / "logits.safetensors")]
    finished = subprocess.run(
        [*command, *map(str, folders.values())],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return load_file(work / "logits.safetensors")


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_pruned_folder_loads_bit_for_bit(
    name: str, folders: dict[str, Path], cut_models: dict[str, PreTrainedModel]
) -> None:
    assert torch.equal(logits_of(load_dense(str(folders[name]), "float32")), logits_of(cut_models[name]))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_new_process_needs_one_import(
    name: str, fresh_logits: dict[str, torch.Tensor], cut_models: dict[str, PreTrainedModel]
) -> None:
    assert torch.equal(fresh_logits[name], logits_of(cut_models[name]))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_widths_stand_under_the_standard_key(name: str, folders: dict[str, Path]) -> None:
    written = json.loads((folders[name] / "config.json").read_text())
    assert written["model_type"] == name
    assert set(written["per_layer_config"]) == {"0", "2"}, "block 1 was not cut"
    for index, units in KEPT.items():
        layer = written["per_layer_config"][str(index)]
        assert layer["num_key_value_heads"] == len(units["attention"])
        assert layer["num_attention_heads"] == 2 * len(units["attention"])
        assert layer["intermediate_size"] == len(units["mlp"])


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_generation_with_a_cache_is_generation_without(name: str, folders: dict[str, Path]) -> None:
    model = load_dense(str(folders[name]), "float32")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(prompt(), use_cache=True, **options)
    uncached = model.generate(prompt(), use_cache=False, **options)
    assert cached.shape == (2, 14)
    assert torch.equal(cached, uncached)


def test_the_tokenizer_comes_along(folders: dict[str, Path], tiny_model: Path) -> None:
    text = "Question: Why does ice float?"
    assert load_tokenizer(str(folders["llama"]))(text) == load_tokenizer(str(tiny_model))(text)


def test_an_instruct_model_stops_where_it_did_before() -> None:
    """Chat models end a turn with a token that only generation_config.json names."""
    model = family_model("llama")
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    kept = cut(model, KEPT).generation_config
    assert kept.eos_token_id == [2, 7]
    assert (kept.do_sample, kept.temperature) == (True, 0.25)


def test_a_folder_of_shards_loads_like_one_file(cut_models: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    cut_models["qwen2"].save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(load_dense(str(tmp_path), "float32")), logits_of(cut_models["qwen2"]))


def test_a_truncated_weight_file_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(folders["llama"], folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(CorruptFile, match="broken"):
        load_dense(str(folder), "float32")


def test_a_missing_shard_is_told_before_anything_is_loaded(
    cut_models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    cut_models["llama"].save_pretrained(tmp_path, max_shard_size="20KB")
    gone = min(tmp_path.glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        prepare_base(ModelConfig(source=str(tmp_path)), tmp_path / "unused")


def test_a_local_folder_is_used_where_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    base = prepare_base(ModelConfig(source=str(folders["mistral"])), tmp_path / "model")
    assert (base.path, base.converted) == (str(folders["mistral"]), False)
    assert not (tmp_path / "model").exists()


def test_the_config_of_a_pruned_folder_knows_its_widths(folders: dict[str, Path]) -> None:
    config = load_model_config(ModelConfig(source=str(folders["qwen3"])))
    widths = [config.per_layer_config[index].intermediate_size for index in range(LAYERS)]
    assert widths == [len(KEPT[0]["mlp"]), 40, len(KEPT[2]["mlp"])]
