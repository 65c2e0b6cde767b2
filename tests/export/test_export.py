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
    assert outcome["folder"] == str(folder)
    assert outcome["is_plain"]
    assert outcome["num_positions"] == 46
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "per_layer_config" not in config
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert (
        off_by(logits_of(AutoModelForCausalLM.from_pretrained(folder)), finished / "final") < 0.05
    )


def test_a_merged_uniform_model_needs_no_qpruner(tiny_model: Path, tmp_path: Path) -> None:
    prune = {"rate": 0.2, "uniform": True, "importance": "magnitude"}
    raw = raw_config(tiny_model, tmp_path / "cut") | {"prune": prune}
    run_pipeline(validate_config(raw), lambda event: None, until="prune")
    run = finished_run(next((tmp_path / "cut" / "cuts").glob("*[0-9]")), tmp_path / "run")
    steps: list[tuple[str, int, int]] = []
    done = export(RunDir(run), "merged", tmp_path / "merged", lambda *step: steps.append(step))
    ended = [name for name, count, total in steps if count == total]
    compared = ["loading weights", "comparing predictions"]
    assert [name for name, _ in groupby(ended)] == ["merging the adapter", *compared]
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
    with pytest.raises(StageError, match="diverge by nan nats per token"):
        export(RunDir(root), "merged", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base, added: base, "of its adapter's effect|diverge by"),
        (lambda base, added: base + 2 * added, "of its adapter's effect|diverge by"),
        (lambda base, added: base.roll(1, 0) + added, "diverge by"),
    ],
    ids=["adapter lost", "adapter twice", "rows moved"],
)
def test_damage_is_noticed(
    damage: Callable[..., torch.Tensor], message: str, finished: Path, tmp_path: Path
) -> None:
    done = export(RunDir(finished), "merged", tmp_path / "merged")
    weights = load_file(done.folder / "model.safetensors")
    adapter = load_file(finished / "final" / ADAPTER)
    for name in [name for name in adapter if name.endswith(".lora_A.weight")]:
        lora_a = adapter[name].float()
        lora_b = adapter[name.replace(".lora_A.", ".lora_B.")].float()
        added = LORA.alpha / LORA.rank * lora_b @ lora_a
        path = name.removeprefix("base_model.model.")
        weight = weights[path.replace(".lora_A.", ".")]
        weight.copy_(damage(weight.float() - added, added))
    save_file(weights, done.folder / "model.safetensors", {"format": "pt"})
    rows = load_encoded(finished / "prepare" / "data" / "confirmation")
    with pytest.raises(StageError, match=message):
        compare(finished / "final", done.folder, [row["input_ids"] for row in rows])


def test_an_export_without_model_or_over_a_folder_is_refused(
    finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no final model"):
        export(RunDir(tmp_path), "merged", tmp_path / "out")
    with pytest.raises(UserError, match="exists: delete this folder or name another with `--out`"):
        export(RunDir(finished), "merged", tmp_path)
