"""A model is written again in other formats: what stays keeps its bytes, what changes is packed
once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, flip_a_byte, with_keys
from gguf import GGUFReader
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
    formats: dict[str, str] = json.loads((folder / "config.json").read_text())[
        "quantization_config"
    ]["formats"]
    return formats


def weight_of(folder: Path, path: str, columns: int) -> torch.Tensor:
    tensors = layer_tensors(load_file(folder / "model.safetensors"), path)
    return format_of(formats_of(folder).get(path, DENSE)).unpack(tensors, columns, torch.float32)


def test_a_model_whose_formats_stay_keeps_every_byte(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several files too, which transformers finds by their index."""
    monkeypatch.setattr(recoding, "SHARD_BYTES", 60_000)
    assert recode(final, tmp_path / "same", lambda name, columns: name, merge=False) == {}
    files = sorted((tmp_path / "same").glob("model*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 250_000
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(final / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert formats_of(tmp_path / "same") == formats_of(final)
    for name in ADAPTER_FILES:
        assert (tmp_path / "same" / name).read_bytes() == (final / name).read_bytes()
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (final, tmp_path / "same")]
    assert torch.equal(*map(logits_of, models))


def test_layers_of_one_format_are_packed_again_alone(final: Path, tmp_path: Path) -> None:
    changed = recode(
        final,
        tmp_path / "new",
        lambda name, columns: "q4_0" if name == "nf4" else name,
        merge=False,
    )
    old = formats_of(final)
    new = formats_of(tmp_path / "new")
    assert changed == {path: "q4_0" for path, name in old.items() if name == "nf4"}
    assert changed
    assert new == old | changed
    path = "model.layers.0.self_attn.q_proj"
    weight = weight_of(final, path, 64)
    packed = format_of("q4_0").pack(weight)["weight"]
    assert torch.equal(load_file(tmp_path / "new" / "model.safetensors")[f"{path}.weight"], packed)


@pytest.mark.parametrize(
    "gram", [None, torch.arange(4096.0).square().sin().view(64, 64)], ids=["nearest", "GPTQ"]
)
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "w4"])
def test_an_adapter_is_merged_into_packed_weights(
    final: Path, name: str, gram: torch.Tensor | None, tmp_path: Path
) -> None:
    """Weights are unpacked, added to and packed in float32; layers that were dense stay so."""
    gram = gram if gram is None else gram.T @ gram
    grams = {
        path: gram
        for path, columns in columns_of(checkpoint_config(final)).items()
        if columns == 64
    }
    changed = recode(
        final, tmp_path / "new", lambda old, columns: name, merge=True, gram_of=grams.get
    )
    assert formats_of(tmp_path / "new") == changed == dict.fromkeys(formats_of(final), name)
    assert not [file for file in ADAPTER_FILES if (tmp_path / "new" / file).exists()]
    adapter = load_file(final / ADAPTER_FILES[1])
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
        lora_a, lora_b = (
            adapter[f"base_model.model.{path}.lora_{side}.weight"].float() for side in "AB"
        )
        exact = weight_of(final, path, 64) + LORA.alpha / LORA.rank * (lora_b @ lora_a)
        found = weight_of(tmp_path / "new", path, 64)
        is_packed = path in changed
        expected = format_of(name).unpack(pack(format_of(name), exact, gram), 64, torch.float32)
        assert torch.equal(found, expected if is_packed else exact.bfloat16().float())
        nearest = format_of(name).unpack(format_of(name).pack(exact), 64, torch.float32)
        assert torch.equal(expected, nearest) == (gram is None or name == "q8_0"), (
            "8 bits round to nearest"
        )
    if name == "q8_0":
        assert (
            off_by(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), final) < 0.05
        )


@pytest.mark.slow
def test_the_gram_matrices_of_a_run_round_its_merged_model(tiny_raw: dict[str, Any]) -> None:
    """A damaged one is an error, which leaves no export."""
    del tiny_raw["quantize"]["bits"]
    gptq = {
        "quantize.formats": ["q4_0"],
        "quantize.rounding": "gptq",
        "quantize.embeddings": ["q4_0", "q8_0"],
    }
    others = {
        "search.plan": "first_order",
        "finetune.compare": False,
        "quantize.budget": {"bytes": 600_000},
    }
    config = validate_config(with_keys(tiny_raw, **gptq, **others))
    run(config, lambda event: None, until="finetune")
    run_dir = RunDir(config.output)
    path = "model.layers.1.mlp.down_proj"
    final = run_dir.root / "final"
    done = command("export", config.output, "--to", "gguf", "--merge")
    assert done.exit_code == 0, done.output
    record = run_dir.read_record("finetune", FinetuneRecord)
    assert record
    winner = record.winner
    columns = columns_of(checkpoint_config(final))[path]
    gram = read_grams(run_dir.bank(winner.cut), winner.bank, checkpoint_config(final), [path])[path]
    adapter = load_file(final / ADAPTER_FILES[1])
    lora_a, lora_b = (
        adapter[f"base_model.model.{path}.lora_{side}.weight"].float() for side in "AB"
    )
    stored = layer_tensors(read_tensors(final, lambda name: True), path)
    exact = format_of("q4_0").unpack(stored, columns, torch.float32) + lora_b @ lora_a * 2
    [file] = (run_dir.root / "export" / "gguf_merged").glob("*.gguf")
    [found] = (
        each.data for each in GGUFReader(file).tensors if each.name == "blk.1.ffn_down.weight"
    )
    by_gptq = pack(format_of("q4_0"), exact, gram)["weight"].numpy()
    nearest = pack(format_of("q4_0"), exact, None)["weight"].numpy()
    assert (found == by_gptq.reshape(found.shape)).all()
    assert not (found == nearest.reshape(found.shape)).all()
    flip_a_byte(run_dir.bank(winner.cut) / "grams" / "model.layers.1.safetensors")
    done = command(
        "export", config.output, "--to", "gguf", "--merge", "--out", run_dir.root / "again"
    )
    assert done.exit_code == 1
    assert "by which GPTQ rounds, is missing, damaged or changed" in done.output
    assert not (run_dir.root / "again").exists()
