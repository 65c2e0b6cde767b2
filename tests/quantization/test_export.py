"""Exports predict what the final model predicts, or they do not come into being."""

from __future__ import annotations

import json
import re
import shutil
from itertools import groupby
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mixed_models import finished_run, logits_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qpruner.hf  # noqa: F401
from qpruner.cli import main
from qpruner.errors import StageError, UserError
from qpruner.export import export
from qpruner.rundir import RunDir


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny_model, tmp_path_factory.mktemp("finished"))


def test_a_merged_model_is_dense_plain_and_predicts_the_same(finished: Path) -> None:
    told = CliRunner().invoke(main, ["export", str(finished), "--to", "merged", "--json"])
    assert told.exit_code == 0, told.output
    outcome = json.loads(told.output.splitlines()[-1])
    folder = finished / "export" / "merged"
    assert outcome["folder"] == str(folder) and outcome["is_plain"] and outcome["num_positions"] == 48
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "per_layer_config" not in config
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    merged = logits_of(AutoModelForCausalLM.from_pretrained(folder)).log_softmax(-1)
    final = AutoModelForCausalLM.from_pretrained(finished / "final")
    expected = logits_of(final).log_softmax(-1)
    for name, parameter in final.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    without = logits_of(final).log_softmax(-1)
    assert (merged - expected).abs().mean() < 0.05 * (without - expected).abs().mean()


def test_an_export_tells_how_far_it_is(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpruner.terminal.SECONDS_UNTOLD", 0.0)
    done = CliRunner().invoke(main, ["export", str(finished), "--to", "merged", "--out", str(tmp_path / "out")])
    lines = [re.fullmatch(r"\[export\] (.*): (\d+) of (\d+)", line) for line in done.stdout.splitlines()]
    ended = [line[1] for line in lines if line and line[2] == line[3]]
    compared = ["loading weights", "comparing predictions"]
    # The final model's adapter is loaded by itself.
    made = ["merging the adapter", "saving weights"]
    assert [what for what, _ in groupby(ended)] == [*made, *compared, *compared], done.output


def test_a_peft_export_is_the_same_model(finished: Path, tmp_path: Path) -> None:
    done = export(RunDir(finished), "peft", tmp_path / "mine")
    assert done.divergence < 1e-3 and done.agreement > 0.9
    assert not (tmp_path / "mine" / "base" / "adapter_config.json").exists()
    settings = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "mine" / "base")


def test_what_does_not_predict_the_same_leaves_no_folder(finished: Path, tmp_path: Path) -> None:
    """An adapter with a NaN in it: the final model is broken, and so would be whatever is made of it."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    file = root / "final" / "adapter_model.safetensors"
    adapter = load_file(file)
    next(iter(adapter.values()))[0, 0] = torch.nan
    save_file(adapter, file)
    with pytest.raises(StageError, match="diverges by nan nats"):
        export(RunDir(root), "merged", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_exports_say_what_is_missing_or_in_the_way(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no final model"):
        export(RunDir(tmp_path), "merged", tmp_path / "out")
    with pytest.raises(UserError, match="name another folder with `--out`"):
        export(RunDir(finished), "merged", tmp_path)
