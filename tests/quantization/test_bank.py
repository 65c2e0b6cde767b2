"""The bank: every trial reads exactly the tensors that were packed, and a damaged file is named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import disk_of, flip_a_byte
from mixed_models import DTYPE, GROUP, LEVELS, LORA, seal

from qpruner.errors import CorruptFile, StorageError
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense
from qpruner.quantization.bank import Entry, GroupJob, build_entry, build_group, entry_file, read_plan, write_entry
from qpruner.quantization.formats import DENSE, format_of
from qpruner.quantization.mixed import layer_tensors
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import file_digest

Tensors = dict[str, torch.Tensor]
MLP, QKV = "layers.0.mlp", "layers.0.qkv"


def weights() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.layers.0.mlp.gate_proj": torch.randn(96, 64, generator=generator).to(torch.bfloat16),
        "model.layers.0.mlp.up_proj": torch.randn(77, 128, generator=generator).to(torch.bfloat16),
    }


def entry_of(level: str = "nf4", layers: Tensors | None = None, grams: Tensors | None = None, **lora: Any) -> Entry:
    return build_entry(layers or weights(), format_of(level), LORA.model_copy(update=lora), seed=0, grams=grams)


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("init", ["loftq", "plain"])
def test_read_plan_returns_the_written_tensors(tmp_path: Path, init: str) -> None:
    entries = {level: entry_of(level, init=init) for level in ("nf4", "int8")}
    for level, entry in entries.items():
        write_entry(tmp_path, MLP, level, entry.tensors)
    with pytest.raises(CorruptFile, match=r"has no bank\.json"):
        read_plan(tmp_path, {MLP: "nf4"})
    seal(tmp_path)
    for level, entry in entries.items():
        assert same(read_plan(tmp_path, {MLP: level}), entry.tensors)
        has_adapters = any("lora" in name for name in entry.tensors)
        assert (entry.residual_ratio < 1) == has_adapters == (init == "loftq")
    assert read_plan(tmp_path, {MLP: DENSE}) == {}


def test_an_entry_depends_on_weights_format_and_seed_only() -> None:
    torch.manual_seed(1)
    first = entry_of(loftq_iterations=2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = entry_of(loftq_iterations=2)
    assert same(first.tensors, second.tensors)
    assert (first.residual_ratio, first.error) == (second.residual_ratio, second.error)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("by_outputs", [False, True])
@pytest.mark.parametrize(("level", "rank"), [("nf4", 2), ("int8", 8)])
def test_errors_are_what_is_left_of_the_group(level: str, rank: int, by_outputs: bool) -> None:
    """Under GPTQ, what is left of the outputs' error: that of the weights rises while it falls."""
    inputs = {path: torch.randn(500, weight.shape[1]) for path, weight in weights().items()}
    grams = {path: each.T @ each for path, each in inputs.items()} if by_outputs else None
    for init in ("plain", "loftq"):
        entry = entry_of(level, grams=grams, rank=rank, alpha=float(rank), svd="exact", init=init)
        plain, left, total = 0.0, 0.0, 0.0
        for path, weight in weights().items():
            packed, columns = layer_tensors(entry.tensors, path), weight.shape[1]
            lora_a, lora_b = (
                packed.pop("lora_A", torch.zeros(1, columns)),
                packed.pop("lora_B", torch.zeros(len(weight), 1)),
            )
            change = weight.float() - format_of(level).unpack(packed, columns, torch.float32)
            seen = inputs[path].T if by_outputs else torch.eye(columns)
            plain += float((change @ seen).norm()) ** 2
            left += float(((change - lora_b @ lora_a) @ seen).norm()) ** 2
            total += float((weight.float() @ seen).norm()) ** 2
        assert entry.residual_ratio == pytest.approx((left / plain) ** 0.5, rel=1e-3)
        assert entry.error == pytest.approx(left / total, rel=1e-3)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink], ids=["truncated", "flipped", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_entry(tmp_path, QKV, "int8", entry_of("int8").tensors)
    path = write_entry(tmp_path, MLP, "nf4", entry_of().tensors)
    seal(tmp_path)
    assert read_plan(tmp_path, {MLP: "nf4"})
    damage(path)
    with pytest.raises(CorruptFile, match=str(path)):
        read_plan(tmp_path, {QKV: "int8", MLP: "nf4"})
    assert read_plan(tmp_path, {QKV: "int8"})


def test_a_machine_caches_the_files_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, cache = tmp_path / "bank", tmp_path / "cache"
    monkeypatch.setenv(BANK_CACHE, str(cache))
    tensors = entry_of().tensors
    path = write_entry(bank, MLP, "nf4", tensors)
    seal(bank)
    assert same(read_plan(bank, {MLP: "nf4"}), tensors)
    (copy,) = cache.glob("*.safetensors")
    path.write_bytes(b"no longer read")
    assert same(read_plan(bank, {MLP: "nf4"}), tensors)
    copy.write_bytes(b"damaged")
    with pytest.raises(CorruptFile, match=r"layers\.0\.mlp"):
        read_plan(bank, {MLP: "nf4"})
    write_entry(bank, MLP, "nf4", tensors)
    assert same(read_plan(bank, {MLP: "nf4"}), tensors)
    assert [file.name for file in cache.glob("*.safetensors")] == [copy.name]


def test_a_full_cache_keeps_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entry(tmp_path, MLP, "int8", entry_of("int8").tensors)
    seal(tmp_path)
    with disk_of("16k", tmp_path / "cache") as cache:
        monkeypatch.setenv(BANK_CACHE, str(cache))
        with pytest.raises(StorageError, match=f"no space left for {cache}/[0-9a-f]+.safetensors"):
            read_plan(tmp_path, {MLP: "int8"})
        assert {file.suffix for file in cache.iterdir()} <= {".lock"}


def test_a_worker_builds_the_same_group(tiny_model: Path, tmp_path: Path) -> None:
    """A worker reads the layers of its group from the checkpoint's files, without loading the model."""
    model = load_dense(str(tiny_model), DTYPE)
    name, paths = next(iter(group_linears(model.config, GROUP).items()))
    built = build_group(GroupJob(name, paths, LEVELS, tiny_model, tmp_path, DTYPE, LORA, seed=0))
    seal(tmp_path)
    for level in LEVELS:
        entry = entry_of(level, {path: model.get_submodule(path).weight for path in paths})
        assert same(read_plan(tmp_path, {name: level}), entry.tensors)
        file = entry_file(tmp_path, name, level)
        listed = built[str(file.relative_to(tmp_path))]
        found = (listed.sha256, listed.residual_ratio, listed.error)
        assert found == (file_digest(file), entry.residual_ratio, entry.error)
