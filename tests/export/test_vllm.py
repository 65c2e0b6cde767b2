"""Exports for vLLM predict the same in compressed-tensors, and models of different widths load
without qpruner."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_exports import DAMAGES, ROWS, damaged
from final_models import outcome_of, pruned_model, run_of, run_of_llama
from made_tensors import distance
from mixed_models import logits_of, token_ids
from plain_transformers import plain_transformers_answers
from transformers import AutoConfig, AutoModelForCausalLM

from qpruner.errors import StageError, UserError
from qpruner.export.card import loading_section
from qpruner.export.forms import export
from qpruner.export.hub import _form
from qpruner.export.vllm import checking
from qpruner.export.vllm.writing import MODELING, SERVED, vllm_format, write_config
from qpruner.quantization.formats import DENSE, format_of, formats
from qpruner.runs.run_dir import RunDir


def test_every_family_with_blocks_of_its_own_loads_without_qpruner(
    tiny_model: Path, tmp_path: Path
) -> None:
    folders = [pruned_model(family, tiny_model, tmp_path / family, True) for family in SERVED]
    for folder in folders:
        described = json.loads((folder / "config.json").read_text())
        write_config(described, AutoConfig.from_pretrained(folder), folder)
    answers = plain_transformers_answers(token_ids().tolist(), folders, tmp_path)
    for folder, answer in zip(folders, answers, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert distance(torch.tensor(answer["logits"]), logits_of(model)) < 1e-5, folder.name
        assert answer["made"] == answer["made without cache"]
        assert _form(folder, "merged") == "merged with code"
    section = loading_section("merged with code", "you/it")
    assert 'from_pretrained("you/it", trust_remote_code=True)' in section


@pytest.mark.parametrize("python", ["/no/python", sys.executable])
def test_a_python_without_vllm_is_refused_before_the_work(
    python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(checking.PYTHON, python)
    with pytest.raises(UserError, match=rf"has vLLM, got {python}: name another, or unset it"):
        checking.missing()


@pytest.mark.parametrize("name", formats())
def test_formats_of_vllm_stay_and_others_become_the_nearest(name: str) -> None:
    nearest = format_of(vllm_format(name, 256))
    is_vllms = name.startswith(("w", DENSE))
    assert nearest.name == name if is_vllms else nearest.name.startswith(("w", DENSE))
    size = format_of(name).packed_bytes(4096, 256, 2)
    # q5_1 takes 6 bits a weight, halfway between the formats of 4.6 and of 8 bits.
    assert 0.75 < nearest.packed_bytes(4096, 256, 2) / size < 1.3


def test_a_format_of_vllm_must_divide_the_width() -> None:
    assert vllm_format("w4", 96) in ("w4_g32", "w4_g32_hqq")
    assert vllm_format("q4_0", 80) == DENSE


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("compressed_tensors")
    root = tmp_path_factory.mktemp("searched")
    return run_of_llama(tiny_model, root, ("w4", "w3_g32", "w8", "bf16"), "w8")


@pytest.fixture(scope="module")
def exported(searched: Path) -> dict[str, Any]:
    return outcome_of(searched, "--to", "vllm")


def test_a_plan_of_vllm_keeps_its_formats(searched: Path, exported: dict[str, Any]) -> None:
    # vLLM before 0.32 reads no packed embeddings.
    assert exported["remarks"] == ["1 layer from w8 to bf16"]
    assert exported["by"].startswith("compressed-tensors")
    assert exported["is_plain"]
    folder = searched / "export" / "vllm"
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].items()
    bits = {name: group["weights"]["num_bits"] for name, group in groups}
    assert bits == {"w4": 4, "w3_g32": 3, "w8": 8}
    assert "model.embed_tokens" in config["ignore"]
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder)
    for name in (MODELING, "adapter/adapter_model.safetensors"):
        assert (folder / name).is_file()


def test_an_adapter_is_merged_into_formats_of_vllm(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    pruned = pruned_model("qwen3", tiny_model, tmp_path / "pruned", False)
    run = run_of(pruned, tmp_path / "run", ("nf4", "bf16"))
    done = export(RunDir(run), "vllm_merged", tmp_path / "out")
    assert done.remarks[0].endswith("from nf4 to w4_g32_hqq")
    assert abs(done.loss - done.loss_before) < 0.1
    for name in ("adapter", MODELING):
        assert not (tmp_path / "out" / name).exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_export_is_noticed(
    searched: Path, exported: dict[str, Any], damage: str, tmp_path: Path
) -> None:
    shutil.copytree(exported["folder"], tmp_path / "out")
    recoded = damaged(searched, tmp_path / "out", damage)
    with pytest.raises(StageError, match=DAMAGES[damage]):
        checking.check(recoded, tmp_path / "out", ROWS)
