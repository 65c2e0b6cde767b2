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
from conftest import command
from final_models import pruned_model, run_of
from mixed_models import token_ids
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
    folders = []
    for family in SERVED:
        folder = pruned_model(family, tiny_model, tmp_path / family, True)
        described = json.loads((folder / "config.json").read_text())
        write_config(described, AutoConfig.from_pretrained(folder), folder)
        folders.append(folder)
    answers = plain_transformers_answers(token_ids().tolist(), folders, tmp_path)
    for folder, answer in zip(folders, answers, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = model(token_ids(), use_cache=False).logits
        found = torch.tensor(answer["logits"])
        assert float((found - expected).norm() / expected.norm()) < 1e-5, folder.name
        assert answer["made"] == answer["made without cache"]
        assert _form(folder, "merged") == "merged with code"
    assert 'from_pretrained("you/it", trust_remote_code=True)' in loading_section(
        "merged with code", "you/it"
    )


@pytest.mark.parametrize("python", ["/no/python", sys.executable])
def test_a_python_without_vllm_is_refused_before_the_work(
    python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(checking.PYTHON, python)
    with pytest.raises(
        UserError, match=rf"must be a Python that has vLLM, got {python}: name another, or unset it"
    ):
        checking.missing()


def test_formats_of_vllm_stay_and_others_become_the_nearest() -> None:
    for name in formats():
        found = format_of(vllm_format(name, 256))
        assert found.name == name or (name[0] != "w" and found.name.startswith(("w", DENSE)))
        size = found.packed_bytes(4096, 256, 2)
        old = format_of(name).packed_bytes(4096, 256, 2)
        assert 0.8 < size / old < 1.3, name
    assert vllm_format("w4", 96) == "w4_g32" or vllm_format("w4", 96) == "w4_g32_hqq"
    assert vllm_format("q4_0", 80) == DENSE, "no group divides 80 columns"


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("compressed_tensors")
    root = tmp_path_factory.mktemp("searched")
    pruned = pruned_model("llama", tiny_model, root / "pruned", True)
    return run_of(pruned, root / "run", ("w4", "w3_g32", "w8", "bf16"), "w8")


@pytest.fixture(scope="module")
def exported(searched: Path) -> dict[str, Any]:
    done = command("export", searched, "--to", "vllm", "--json")
    assert done.exit_code == 0, done.output
    outcome: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    return outcome


def test_a_plan_of_vllm_keeps_its_formats(searched: Path, exported: dict[str, Any]) -> None:
    assert exported["remarks"] == ["1 layer from w8 to bf16"], (
        "vLLM before 0.32 reads no packed embeddings"
    )
    assert exported["by"].startswith("compressed-tensors")
    assert exported["is_plain"]
    folder = searched / "export" / "vllm"
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"]
    assert {name: group["weights"]["num_bits"] for name, group in groups.items()} == {
        "w4": 4,
        "w3_g32": 3,
        "w8": 8,
    }
    assert "model.embed_tokens" in config["ignore"]
    assert (folder / MODELING).is_file()
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_an_adapter_is_merged_into_formats_of_vllm(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    run = run_of(
        pruned_model("qwen3", tiny_model, tmp_path / "pruned", False),
        tmp_path / "run",
        ("nf4", "bf16"),
    )
    done = export(RunDir(run), "vllm_merged", tmp_path / "out")
    assert done.remarks[0].endswith("from nf4 to w4_g32_hqq")
    assert abs(done.loss - done.loss_before) < 0.1
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / MODELING).exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_export_is_noticed(
    searched: Path, exported: dict[str, Any], damage: str, tmp_path: Path
) -> None:
    shutil.copytree(exported["folder"], tmp_path / "out")
    recoded = damaged(searched, tmp_path / "out", damage)
    with pytest.raises(StageError, match=DAMAGES[damage]):
        checking.check(recoded, tmp_path / "out", ROWS)
