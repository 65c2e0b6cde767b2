"""A model is written again in other formats: what stays keeps its bytes, what changes is packed
once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed_by, command, flip_a_byte, ignore
from final_models import outcome_of
from gguf import GGUFReader
from made_tensors import same
from mixed_models import LORA, final_model, logits_of, off_by
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qpruner.config.load import validate_config
from qpruner.export import recode as recoding
from qpruner.export.recode import ADAPTER_FILES, columns_of, recode
from qpruner.models.checkpoint import read_tensors
from qpruner.models.loading import checkpoint_config
from qpruner.pipeline.run import run
from qpruner.quantization.bank import read_grams
from qpruner.quantization.formats import DENSE, format_of
from qpruner.quantization.mixed import layer_tensors
from qpruner.quantization.rounding import pack
from qpruner.runs.records import FinetuneRecord
from qpruner.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def final(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return final_model(tiny_model, tmp_path_factory.mktemp("final"))


def formats_of(folder: Path) -> dict[str, str]:
    config = json.loads((folder / "config.json").read_text())
    return dict(config["quantization_config"]["formats"])


def weight_of(folder: Path, path: str, columns: int = 64) -> torch.Tensor:
    """Unpack a weight of a saved model."""
    tensors = layer_tensors(read_tensors(folder, lambda name: True), path)
    return unpacked(formats_of(folder).get(path, DENSE), tensors, columns)


def unpacked(name: str, tensors: dict[str, torch.Tensor], columns: int = 64) -> torch.Tensor:
    return format_of(name).unpack(tensors, columns, torch.float32)


def with_adapter(final: Path, path: str, columns: int = 64) -> torch.Tensor:
    """Compute a weight plus its adapter."""
    adapter = load_file(final / ADAPTER_FILES[1])
    lora_a, lora_b = (
        adapter[f"base_model.model.{path}.lora_{side}.weight"].float() for side in "AB"
    )
    return weight_of(final, path, columns) + LORA.alpha / LORA.rank * (lora_b @ lora_a)


def test_a_model_whose_formats_stay_keeps_every_byte(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several files too, which transformers finds by their index."""
    monkeypatch.setattr(recoding, "SHARD_BYTES", 60_000)
    assert recode(final, tmp_path, lambda name, columns: name, merge=False) == {}
    tensors = {}
    files = list(tmp_path.glob("model*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert file.stat().st_size < 250_000
        tensors |= load_file(file)
    assert same(tensors, load_file(final / "model.safetensors"))
    assert formats_of(tmp_path) == formats_of(final)
    for name in ADAPTER_FILES:
        assert (tmp_path / name).read_bytes() == (final / name).read_bytes()
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (final, tmp_path)]
    assert torch.equal(*map(logits_of, models))


def test_layers_of_one_format_are_packed_again_alone(final: Path, tmp_path: Path) -> None:
    formats = {"nf4": "q4_0"}
    changed = recode(final, tmp_path, lambda name, columns: formats.get(name, name), merge=False)
    old = formats_of(final)
    assert changed == {path: "q4_0" for path, name in old.items() if name == "nf4"}
    assert formats_of(tmp_path) == old | changed
    path = "model.layers.0.self_attn.q_proj"
    assert path in changed
    packed = format_of("q4_0").pack(weight_of(final, path))["weight"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")[f"{path}.weight"], packed)


@pytest.mark.parametrize("by_inputs", [False, True], ids=["nearest", "GPTQ"])
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "w4"])
def test_an_adapter_is_merged_into_packed_weights(
    final: Path, name: str, by_inputs: bool, tmp_path: Path
) -> None:
    """Weights are unpacked, added to and packed in float32; layers that were dense stay so."""
    grams = {}
    gram = None
    if by_inputs:
        waves = torch.arange(4096.0).square().sin().view(64, 64)
        gram = waves.T @ waves
        widths = columns_of(checkpoint_config(final))
        grams = {path: gram for path, columns in widths.items() if columns == 64}
    changed = recode(final, tmp_path, lambda old, columns: name, merge=True, gram_of=grams.get)
    assert formats_of(tmp_path) == changed == dict.fromkeys(formats_of(final), name)
    assert not [file for file in ADAPTER_FILES if (tmp_path / file).exists()]
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
        exact = with_adapter(final, path)
        expected = unpacked(name, pack(format_of(name), exact, gram))
        nearest = unpacked(name, format_of(name).pack(exact))
        # 8 bits round to nearest.
        assert torch.equal(expected, nearest) == (not by_inputs or name == "q8_0")
        merged = weight_of(tmp_path, path)
        assert torch.equal(merged, expected if path in changed else exact.bfloat16().float())
    if name == "q8_0":
        merged_model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert off_by(logits_of(merged_model), final) < 0.05


@pytest.mark.slow
def test_the_gram_matrices_of_a_run_round_its_merged_model(tiny_raw: dict[str, Any]) -> None:
    """A damaged one is an error, which leaves no export."""
    del tiny_raw["quantize"]["bits"]
    changes = (
        "quantize.formats=[q4_0]; quantize.rounding=gptq; quantize.embeddings=[q4_0, q8_0]; "
        "quantize.budget={bytes: 600000}; search.plan=first_order; finetune.compare=false"
    )
    config = validate_config(changed_by(changes, tiny_raw))
    run(config, ignore, until="finetune")
    run_dir = RunDir(config.output)
    final = run_dir.root / "final"
    outcome = outcome_of(config.output, "--to", "gguf", "--merge")
    record = run_dir.read_record("finetune", FinetuneRecord)
    assert record
    winner = record.winner
    model_config = checkpoint_config(final)
    path = "model.layers.1.mlp.down_proj"
    grams = read_grams(run_dir.bank(winner.cut), winner.bank, model_config, [path])
    exact = with_adapter(final, path, columns_of(model_config)[path])
    [file] = Path(outcome["folder"]).glob("*.gguf")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    merged = tensors["blk.1.ffn_down.weight"].tobytes()
    assert merged == pack(format_of("q4_0"), exact, grams[path])["weight"].numpy().tobytes()
    assert merged != pack(format_of("q4_0"), exact)["weight"].numpy().tobytes()
    flip_a_byte(run_dir.bank(winner.cut) / "grams" / "model.layers.1.safetensors")
    again = run_dir.root / "again"
    done = command("export", config.output, "--to", "gguf", "--merge", "--out", again)
    assert done.exit_code == 1
    assert "is missing, damaged or changed" in done.output
    assert not again.exists()
