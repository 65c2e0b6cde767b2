"""An export predicts the same as the final model; otherwise no folder is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_exports import change_weights
from conftest import changed_by, ignore, raw_config
from final_models import outcome_of
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
    outcome = outcome_of(finished, "--to", "merged")
    folder = finished / "export" / "merged"
    assert outcome["folder"] == str(folder)
    assert outcome["is_plain"]
    assert outcome["num_positions"] == 46
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "per_layer_config" not in config
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert off_by(logits_of(merged), finished / "final") < 0.05


def test_a_merged_uniform_model_needs_no_qpruner(tiny_model: Path, tmp_path: Path) -> None:
    change = "prune={rate: 0.2, uniform: true, importance: magnitude}"
    raw = changed_by(change, raw_config(tiny_model, tmp_path / "cut"))
    run_pipeline(validate_config(raw), ignore, until="prune")
    [cut] = (tmp_path / "cut" / "cuts").glob("*[0-9]")
    run = finished_run(cut, tmp_path / "run")
    ended: list[str] = []

    def on_progress(work: str, done: int, total: int) -> None:
        if done == total and work not in ended[-1:]:
            ended.append(work)

    done = export(RunDir(run), "merged", tmp_path / "merged", on_progress)
    assert ended == ["merging the adapter", "loading weights", "comparing predictions"]
    assert done.is_plain
    (answer,) = plain_transformers_answers(token_ids().tolist(), [done.folder], tmp_path)
    assert off_by(torch.tensor(answer["logits"]), run / "final") < 0.05


def test_a_failed_comparison_leaves_no_folder(finished: Path, tmp_path: Path) -> None:
    """A NaN in the adapter breaks the final model, so that it cannot be exported."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    change_weights(root / "final" / ADAPTER, "layers.0", lambda weight: weight * torch.nan)
    with pytest.raises(StageError, match="diverge by nan nats"):
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
    for name, lora_a in adapter.items():
        if ".lora_A." in name:
            lora_b = adapter[name.replace(".lora_A.", ".lora_B.")]
            added = LORA.alpha / LORA.rank * lora_b.float() @ lora_a.float()
            path = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            weights[path].copy_(damage(weights[path].float() - added, added))
    save_file(weights, done.folder / "model.safetensors", {"format": "pt"})
    rows = load_encoded(finished / "prepare" / "data" / "confirmation")
    with pytest.raises(StageError, match=message):
        compare(finished / "final", done.folder, [row["input_ids"] for row in rows])


def test_an_export_without_model_or_over_a_folder_is_refused(
    finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no final model"):
        export(RunDir(tmp_path), "merged", tmp_path / "out")
    with pytest.raises(UserError, match=r"exists: delete this folder or .* `--out`"):
        export(RunDir(finished), "merged", tmp_path)
