"""An export predicts the same as the final model; otherwise no folder is written."""

import json
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import command, raw_config
from mixed_models import LORA, finished_run, logits_of, off_by, token_ids
from plain_transformers import plain_transformers_answers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qpruner.config.load import validate_config
from qpruner.data.encoding import load_encoded
from qpruner.errors import StageError, UserError
from qpruner.export.compare import compare
from qpruner.export.forms import export
from qpruner.pipeline.run import run as run_pipeline
from qpruner.quantization.formats import DENSE, format_of
from qpruner.quantization.mixed import layer_tensors
from qpruner.runs.run_dir import RunDir

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny_model, tmp_path_factory.mktemp("finished"))


def test_a_merged_model_predicts_the_same(finished: Path) -> None:
    done = command("export", finished, "--to", "merged", "--json")
    assert done.exit_code == 0, done.output
    outcome = json.loads(done.output.splitlines()[-1])
    folder = finished / "export" / "merged"
    assert outcome["folder"] == str(folder) and outcome["is_plain"] and outcome["num_positions"] == 48
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "per_layer_config" not in config
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert off_by(logits_of(AutoModelForCausalLM.from_pretrained(folder)), finished / "final") < 0.05


def test_a_merged_uniform_model_needs_no_qpruner(tiny_model: Path, tmp_path: Path) -> None:
    prune = {"rate": 0.2, "uniform": True, "importance": "magnitude"}
    raw = raw_config(tiny_model, tmp_path / "cut") | {"prune": prune}
    run_pipeline(validate_config(raw), lambda event: None, until="prune")
    run = finished_run(next((tmp_path / "cut" / "cuts").glob("*[0-9]")), tmp_path / "run")
    steps: list[tuple[str, int, int]] = []
    done = export(RunDir(run), "merged", tmp_path / "merged", lambda *step: steps.append(step))
    ended = [name for name, count, total in steps if count == total]
    compared = ["loading weights", "comparing predictions"]
    assert [name for name, _ in groupby(ended)] == ["merging the adapter", *compared, *compared]
    assert done.is_plain
    (answer,) = plain_transformers_answers(token_ids().tolist(), [done.folder], tmp_path)
    assert off_by(torch.tensor(answer["logits"]), run / "final") < 0.05


def test_a_failed_comparison_leaves_no_folder(finished: Path, tmp_path: Path) -> None:
    """A NaN in the adapter breaks the final model, so that it cannot be exported."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    file = root / "final" / ADAPTER
    adapter = load_file(file)
    next(iter(adapter.values()))[0, 0] = torch.nan
    save_file(adapter, file)
    with pytest.raises(StageError, match="has outputs with an error of nan%"):
        export(RunDir(root), "merged", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.fixture(scope="module")
def faint(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters so small that the loss of one is hidden by rounding in the predictions."""
    root = Path(shutil.copytree(finished, tmp_path_factory.mktemp("faint") / "run"))
    parts = load_file(root / "final" / ADAPTER)
    fainter = {name: part / 800 if "lora_B" in name else part for name, part in parts.items()}
    save_file(fainter, root / "final" / ADAPTER)
    export(RunDir(root), "merged", root / "merged")
    return root


def compared_with(run: Path, tensor: str, value: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> None:
    shutil.copytree(run / "merged", folder)
    weights = load_file(folder / "model.safetensors")
    weights[tensor] = value(weights[tensor])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rows = load_encoded(run / "prepare" / "data" / "confirmation")
    compare(run / "final", folder, [row["input_ids"] for row in rows])


@pytest.mark.parametrize(
    ("layer", "name", "damage", "message"),
    [
        ("self_attn.q_proj", "nf4", lambda base, added: base, r"has -?\d?\d% of its adapter"),
        ("self_attn.o_proj", "int8", lambda base, added: base + 2 * added, r"has (1[5-9]|2[0-4])\d% of its adapter"),
        ("self_attn.o_proj", "int8", lambda base, added: 1.1 * base + added, r"has outputs with an error of 1\d%"),
        ("mlp.up_proj", DENSE, lambda base, added: base + torch.nan, "has outputs with an error of nan%"),
    ],
    ids=["adapter lost", "adapter twice", "another base", "not a number"],
)
def test_one_damaged_layer_is_noticed(
    layer: str, name: str, damage: Callable[..., torch.Tensor], message: str, faint: Path, tmp_path: Path
) -> None:
    layer = f"model.layers.0.{layer}"
    state, adapter = load_file(faint / "final" / "model.safetensors"), load_file(faint / "final" / ADAPTER)
    parts = layer_tensors(state, layer)
    lora_a, lora_b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"].float() for side in "AB")
    columns = lora_a.shape[1]
    base = parts["weight"].float() if name == DENSE else format_of(name).unpack(parts, columns, torch.float32)
    damaged = damage(base, LORA.alpha / LORA.rank * lora_b @ lora_a).to(torch.bfloat16)
    with pytest.raises(StageError, match=rf"`{layer}` {message}"):
        compared_with(faint, f"{layer}.weight", lambda _: damaged, tmp_path / "out")


def test_damage_outside_adapters_changes_predictions(faint: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"diverge by \S+ nats per token, more than 0\.05"):
        compared_with(faint, "model.norm.weight", lambda norm: torch.full_like(norm, 3.0), tmp_path / "out")


def test_an_export_without_model_or_over_a_folder_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no final model"):
        export(RunDir(tmp_path), "merged", tmp_path / "out")
    with pytest.raises(UserError, match="exists: delete this folder or name another with `--out`"):
        export(RunDir(finished), "merged", tmp_path)
