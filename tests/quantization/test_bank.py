"""The bank: what was packed once is what every trial gets, and a broken file is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import disk_of, flip_a_byte
from mixed_models import DTYPE, GROUP, LORA, mixed_plan, seal

from qpruner.errors import CorruptFile, StorageError
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense
from qpruner.quantization.assembly import assemble
from qpruner.quantization.bank import (
    EntrySettings,
    GroupJob,
    build_entry,
    build_group,
    entry_file,
    read_index,
    read_plan,
    write_entry,
    write_index,
)
from qpruner.quantization.mixed import pack, unpack
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import file_digest


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.layers.0.mlp.gate_proj": torch.randn(96, 64, generator=generator).to(torch.bfloat16),
        "model.layers.0.mlp.up_proj": torch.randn(77, 128, generator=generator).to(torch.bfloat16),
    }


def settings(**changes: object) -> EntrySettings:
    return EntrySettings(LORA.model_copy(update=changes), double_quant=False, seed=0)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("init", ["loftq", "plain"])
def test_a_plan_reads_what_was_written(tmp_path: Path, init: str) -> None:
    entries = {bits: build_entry(weights(), bits, settings(init=init)) for bits in (4, 8)}
    for bits, entry in entries.items():
        write_entry(tmp_path, "layers.0.mlp", bits, entry)
    seal(tmp_path)
    for bits, entry in entries.items():
        assert same(read_plan(tmp_path, {"layers.0.mlp": bits}), entry.tensors)
    assert read_plan(tmp_path, {"layers.0.mlp": 16}) == {}
    if init == "plain":
        assert entries[4].residual_ratio == 1.0 and not any("lora" in name for name in entries[4].tensors)


def test_an_entry_is_a_pure_function_of_weights_and_bits() -> None:
    torch.manual_seed(1)
    first = build_entry(weights(), 4, settings(loftq_iterations=2))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_entry(weights(), 4, settings(loftq_iterations=2))
    assert same(first.tensors, second.tensors)
    assert first.residual_ratio == second.residual_ratio
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("bits", "rank"), [(4, 2), (8, 8)])
def test_the_residual_ratio_is_the_share_of_error_left(bits: int, rank: int) -> None:
    entry = build_entry(weights(), bits, settings(rank=rank, alpha=float(rank), svd="exact"))
    plain, left = 0.0, 0.0
    for path, weight in weights().items():
        packed = {
            name.removeprefix(f"{path}."): tensor for name, tensor in entry.tensors.items() if name.startswith(path)
        }
        adapter = packed.pop("lora_B") @ packed.pop("lora_A")
        left += float((weight.float() - unpack(packed, torch.float32) - adapter).norm()) ** 2
        plain += float((weight.float() - unpack(pack(weight, bits, False), torch.float32)).norm()) ** 2
    assert entry.residual_ratio == pytest.approx((left / plain) ** 0.5, rel=1e-3, abs=1e-4)
    assert 0 <= entry.residual_ratio < 1


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink], ids=["truncated", "flipped", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_entry(tmp_path, "layers.0.qkv", 8, build_entry(weights(), 8, settings()))
    path = write_entry(tmp_path, "layers.0.mlp", 4, build_entry(weights(), 4, settings()))
    seal(tmp_path)
    assert read_plan(tmp_path, {"layers.0.mlp": 4})
    damage(path)
    with pytest.raises(CorruptFile, match=str(path)):
        read_plan(tmp_path, {"layers.0.qkv": 8, "layers.0.mlp": 4})
    assert read_plan(tmp_path, {"layers.0.qkv": 8})


def test_a_machine_keeps_a_copy_of_what_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, cache = tmp_path / "bank", tmp_path / "cache"
    monkeypatch.setenv(BANK_CACHE, str(cache))
    entry = build_entry(weights(), 4, settings())
    path = write_entry(bank, "layers.0.mlp", 4, entry)
    seal(bank)
    assert same(read_plan(bank, {"layers.0.mlp": 4}), entry.tensors)
    (copy,) = cache.glob("*.safetensors")
    path.write_bytes(b"no longer read")
    assert same(read_plan(bank, {"layers.0.mlp": 4}), entry.tensors)
    copy.write_bytes(b"damaged")
    with pytest.raises(CorruptFile, match=r"layers\.0\.mlp"):
        read_plan(bank, {"layers.0.mlp": 4})
    write_entry(bank, "layers.0.mlp", 4, entry)
    assert same(read_plan(bank, {"layers.0.mlp": 4}), entry.tensors)
    assert [file.name for file in cache.glob("*.safetensors")] == [copy.name]


def test_a_full_cache_keeps_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entry(tmp_path, "layers.0.mlp", 8, build_entry(weights(), 8, settings()))
    seal(tmp_path)
    with disk_of("16k", tmp_path / "cache") as cache:
        monkeypatch.setenv(BANK_CACHE, str(cache))
        with pytest.raises(StorageError, match=f"no space left for {cache}/[0-9a-f]+.safetensors"):
            read_plan(tmp_path, {"layers.0.mlp": 8})
        assert {file.suffix for file in cache.iterdir()} <= {".lock"}


def test_a_folder_that_is_no_bank_of_this_version_is_refused(tmp_path: Path) -> None:
    write_entry(tmp_path, "layers.0.mlp", 4, build_entry(weights(), 4, settings()))
    with pytest.raises(CorruptFile, match=r"has no bank\.json"):
        read_plan(tmp_path, {"layers.0.mlp": 4})
    seal(tmp_path)
    write_index(tmp_path, read_index(tmp_path).model_copy(update={"bitsandbytes": "0.1.2"}))
    with pytest.raises(CorruptFile, match=r"packed by bitsandbytes 0\.1\.2"):
        read_plan(tmp_path, {"layers.0.mlp": 4})


def test_a_group_built_by_a_worker_is_the_group_built_here(tiny_model: Path, tmp_path: Path) -> None:
    """Workers read the layers they need from the checkpoint's files; no model is loaded."""
    model = load_dense(str(tiny_model), DTYPE)
    name, paths = next(iter(group_linears(model.config, GROUP).items()))
    built = build_group(GroupJob(tiny_model, tmp_path, name, paths, (4, 8), DTYPE, settings()))
    seal(tmp_path)
    for bits in (4, 8):
        entry = build_entry({path: model.get_submodule(path).weight for path in paths}, bits, settings())
        assert same(read_plan(tmp_path, {name: bits}), entry.tensors)
        file = entry_file(tmp_path, name, bits)
        assert built[str(file.relative_to(tmp_path))] == (file_digest(file), entry.residual_ratio)


def test_a_broken_checkpoint_shard_is_named(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "pruned"
    load_dense(str(tiny_model), DTYPE).save_pretrained(checkpoint, max_shard_size="60KB")
    names = list(group_linears(load_dense(str(checkpoint), DTYPE).config, GROUP))
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert len(shards) > 1
    os.truncate(shards[1], 100)
    with pytest.raises(CorruptFile, match=shards[1].name):
        assemble(checkpoint, tmp_path / "bank", GROUP, mixed_plan(names, (16,)), DTYPE, double_quant=False)
