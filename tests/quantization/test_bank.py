"""The bank: every trial reads exactly the tensors that were packed, and a damaged file is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import disk_of, flip_a_byte
from mixed_models import DTYPE, GROUP, LORA, seal

from qpruner.errors import CorruptFile, StorageError
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense
from qpruner.quantization.bank import GroupJob, build_entry, build_group, entry_file, read_plan, write_entry
from qpruner.quantization.mixed import layer_tensors, pack, unpack
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


def entry_of(bits: int = 4, layers: Tensors | None = None, **lora: Any) -> tuple[Tensors, float]:
    return build_entry(layers or weights(), bits, LORA.model_copy(update=lora), double_quant=False, seed=0)


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("init", ["loftq", "plain"])
def test_read_plan_returns_the_written_tensors(tmp_path: Path, init: str) -> None:
    entries = {bits: entry_of(bits, init=init) for bits in (4, 8)}
    for bits, (tensors, _) in entries.items():
        write_entry(tmp_path, MLP, bits, tensors)
    with pytest.raises(CorruptFile, match=r"has no bank\.json"):
        read_plan(tmp_path, {MLP: 4})
    seal(tmp_path)
    for bits, (tensors, ratio) in entries.items():
        assert same(read_plan(tmp_path, {MLP: bits}), tensors)
        assert ratio < 1 if init == "loftq" else ratio == 1 and not any("lora" in name for name in tensors)
    assert read_plan(tmp_path, {MLP: 16}) == {}


def test_an_entry_depends_on_weights_bits_and_seed_only() -> None:
    torch.manual_seed(1)
    first, ratio = entry_of(loftq_iterations=2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, again = entry_of(loftq_iterations=2)
    assert same(first, second) and ratio == again
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("bits", "rank"), [(4, 2), (8, 8)])
def test_the_residual_ratio_is_the_remaining_error(bits: int, rank: int) -> None:
    tensors, ratio = entry_of(bits, rank=rank, alpha=float(rank), svd="exact")
    plain, left = 0.0, 0.0
    for path, weight in weights().items():
        packed = layer_tensors(tensors, path)
        adapter = packed.pop("lora_B") @ packed.pop("lora_A")
        left += float((weight.float() - unpack(packed, torch.float32) - adapter).norm()) ** 2
        plain += float((weight.float() - unpack(pack(weight, bits, False), torch.float32)).norm()) ** 2
    assert ratio == pytest.approx((left / plain) ** 0.5, rel=1e-3, abs=1e-4)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink], ids=["truncated", "flipped", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_entry(tmp_path, QKV, 8, entry_of(8)[0])
    path = write_entry(tmp_path, MLP, 4, entry_of(4)[0])
    seal(tmp_path)
    assert read_plan(tmp_path, {MLP: 4})
    damage(path)
    with pytest.raises(CorruptFile, match=str(path)):
        read_plan(tmp_path, {QKV: 8, MLP: 4})
    assert read_plan(tmp_path, {QKV: 8})


def test_a_machine_caches_the_files_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, cache = tmp_path / "bank", tmp_path / "cache"
    monkeypatch.setenv(BANK_CACHE, str(cache))
    tensors, _ = entry_of()
    path = write_entry(bank, MLP, 4, tensors)
    seal(bank)
    assert same(read_plan(bank, {MLP: 4}), tensors)
    (copy,) = cache.glob("*.safetensors")
    path.write_bytes(b"no longer read")
    assert same(read_plan(bank, {MLP: 4}), tensors)
    copy.write_bytes(b"damaged")
    with pytest.raises(CorruptFile, match=r"layers\.0\.mlp"):
        read_plan(bank, {MLP: 4})
    write_entry(bank, MLP, 4, tensors)
    assert same(read_plan(bank, {MLP: 4}), tensors)
    assert [file.name for file in cache.glob("*.safetensors")] == [copy.name]


def test_a_full_cache_keeps_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entry(tmp_path, MLP, 8, entry_of(8)[0])
    seal(tmp_path)
    with disk_of("16k", tmp_path / "cache") as cache:
        monkeypatch.setenv(BANK_CACHE, str(cache))
        with pytest.raises(StorageError, match=f"no space left for {cache}/[0-9a-f]+.safetensors"):
            read_plan(tmp_path, {MLP: 8})
        assert {file.suffix for file in cache.iterdir()} <= {".lock"}


def test_a_worker_builds_the_same_group(tiny_model: Path, tmp_path: Path) -> None:
    """A worker reads the layers of its group from the checkpoint's files, without loading the model."""
    model = load_dense(str(tiny_model), DTYPE)
    name, paths = next(iter(group_linears(model.config, GROUP).items()))
    built = build_group(GroupJob(name, paths, (4, 8), tiny_model, tmp_path, DTYPE, LORA, False, seed=0))
    seal(tmp_path)
    for bits in (4, 8):
        tensors, ratio = entry_of(bits, {path: model.get_submodule(path).weight for path in paths})
        assert same(read_plan(tmp_path, {name: bits}), tensors)
        file = entry_file(tmp_path, name, bits)
        listed = built[str(file.relative_to(tmp_path))]
        assert (listed.sha256, listed.residual_ratio) == (file_digest(file), ratio)
