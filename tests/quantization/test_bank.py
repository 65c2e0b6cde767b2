"""The bank: every trial reads exactly the tensors that were packed; what is missing or damaged is
made on first use."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import disk_of, fill, flip_a_byte
from made_tensors import normal, same, token_rows
from mixed_models import DTYPE, GROUP, LEVELS, LORA, bank_source, groups_of, mixed_plan

from qpruner.data.calibration import Samples
from qpruner.errors import StorageError
from qpruner.models.layout import group_linears, group_paths, table_paths
from qpruner.models.loading import load_dense
from qpruner.pruning.grams import gather
from qpruner.quantization.bank import (
    BankSource,
    Entry,
    build_entries,
    make_entries,
    read_plan,
    write_grams,
)
from qpruner.quantization.formats import DENSE, format_of
from qpruner.quantization.mixed import layer_tensors
from qpruner.quantization.rounding import pack
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import file_digest, folder_digests

Tensors = dict[str, torch.Tensor]
DOWN = "layers.0.down"
QKV = "layers.0.qkv"
DOWN_NF4 = (DOWN, "nf4")
FIRST = {DOWN: "nf4"}
PLAN = {DOWN: "nf4", QKV: "int8"}


@pytest.fixture
def bank(tiny_model: Path, tmp_path: Path) -> BankSource:
    return bank_source(tiny_model, tmp_path / "bank")


def weights() -> Tensors:
    return {
        "model.layers.0.mlp.gate_proj": normal(96, 64).bfloat16(),
        "model.layers.0.mlp.up_proj": normal(77, 128, seed=1).bfloat16(),
    }


def entry_of(
    level: str = "nf4", layers: Tensors | None = None, grams: Tensors | None = None, **lora: Any
) -> Entry:
    settings = LORA.model_copy(update=lora)
    [entry] = build_entries(
        layers or weights(), [format_of(level)], lambda packing: settings, seed=0, grams=grams
    )
    return entry


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("init", ["loftq", "plain"])
def test_an_entry_is_made_once_and_then_read(bank: BankSource, init: str, level: str) -> None:
    """It is that of the layers of its group in the files of the checkpoint."""
    bank = replace(bank, lora=LORA.model_copy(update={"init": init}))
    model = load_dense(str(bank.checkpoint), DTYPE)
    paths = group_linears(model.config, bank.grouping)[DOWN]
    layers = {path: model.get_submodule(path).weight for path in paths}
    expected = entry_of(level, layers, init=init)
    made = read_plan(bank, {DOWN: level})
    file = bank.file(DOWN, level)
    written = file.stat().st_ino
    assert same(made, expected.tensors)
    assert same(read_plan(bank, {DOWN: level}), made)
    assert file.stat().st_ino == written
    record = bank.entry(DOWN, level)
    assert record.sha256 == file_digest(file)
    assert record.residual_ratio == expected.residual_ratio
    assert record.error == expected.error
    has_adapter = any("lora" in name for name in made)
    assert (record.residual_ratio < 1) == has_adapter == (init == "loftq")
    assert read_plan(bank, {DOWN: DENSE}) == {}


def test_an_entry_depends_on_weights_format_and_seed_only() -> None:
    torch.manual_seed(1)
    first = entry_of(loftq_iterations=2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = entry_of(loftq_iterations=2)
    assert same(first.tensors, second.tensors)
    assert first.residual_ratio == second.residual_ratio
    assert first.error == second.error
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("init", ["plain", "loftq"])
@pytest.mark.parametrize("by_outputs", [False, True])
@pytest.mark.parametrize(("level", "rank"), [("nf4", 2), ("int8", 8)])
def test_errors_are_what_is_left_of_the_group(
    level: str, rank: int, by_outputs: bool, init: str
) -> None:
    """Under GPTQ, what is left of the outputs' error: that of the weights rises while it falls."""
    inputs = {path: torch.eye(weight.shape[1]) for path, weight in weights().items()}
    grams = None
    if by_outputs:
        inputs = {path: normal(500, len(eye), seed=2) for path, eye in inputs.items()}
        grams = {path: rows.T @ rows for path, rows in inputs.items()}
    entry = entry_of(level, grams=grams, rank=rank, alpha=float(rank), svd="exact", init=init)
    plain = left = total = 0.0
    for path, weight in weights().items():
        packed = layer_tensors(entry.tensors, path)
        lora_a = packed.pop("lora_A", torch.zeros(1, weight.shape[1]))
        lora_b = packed.pop("lora_B", torch.zeros(len(weight), 1))
        change = weight.float() - format_of(level).unpack(packed, weight.shape[1], torch.float32)
        plain += float((change @ inputs[path].T).square().sum())
        left += float(((change - lora_b @ lora_a) @ inputs[path].T).square().sum())
        total += float((weight.float() @ inputs[path].T).square().sum())
    assert entry.residual_ratio == pytest.approx((left / plain) ** 0.5, rel=1e-3)
    assert entry.error == pytest.approx(left / total, rel=1e-3)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize(
    "damage",
    [lambda file: os.truncate(file, 100), flip_a_byte, Path.unlink],
    ids=["truncated", "flipped", "missing"],
)
def test_only_a_damaged_entry_is_made_again(
    bank: BankSource, damage: Callable[[Path], None], suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = read_plan(bank, PLAN)
    digests = folder_digests(bank.folder)
    other = bank.file(QKV, "int8")
    untouched = other.stat().st_mtime_ns
    damaged = bank.file(*DOWN_NF4).with_suffix(suffix)
    damage(damaged)
    assert same(read_plan(bank, PLAN), before)
    assert folder_digests(bank.folder) == digests
    assert other.stat().st_mtime_ns == untouched
    is_unnoticed = damage is Path.unlink and suffix == ".json"
    assert (str(damaged) in caplog.text) is not is_unnoticed


@pytest.mark.parametrize("change", [{}, {"lora": LORA.model_copy(update={"rank": 2})}])
def test_an_entry_of_other_inputs_is_not_read(bank: BankSource, change: dict[str, Any]) -> None:
    read_plan(bank, PLAN)
    other = replace(bank, inputs="others", **change)
    before = bank.file(*DOWN_NF4).stat().st_ino
    read_plan(other, FIRST)
    assert bank.file(*DOWN_NF4).stat().st_ino != before
    assert other.entry(*DOWN_NF4)
    assert not bank.entry(*DOWN_NF4)
    assert bank.entry(QKV, "int8")


FORK = multiprocessing.get_context("fork")


def make(bank: BankSource, plan: dict[str, str], may_begin: Any) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not here
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    may_begin.wait()
    read_plan(bank, plan)


@contextmanager
def maker(bank: BankSource, plan: dict[str, str]) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A process that reads a plan once the function is called."""
    may_begin = FORK.Event()
    process = FORK.Process(target=make, args=(bank, plan, may_begin))
    process.start()
    try:
        yield process, may_begin.set
    finally:
        process.kill()
        process.join()


def test_two_processes_may_make_the_same_entries(bank: BankSource, tmp_path: Path) -> None:
    plan = mixed_plan(groups_of(bank), LEVELS)
    expected = read_plan(replace(bank, folder=tmp_path / "alone"), plan)
    with maker(bank, plan) as (one, begin_one), maker(bank, plan) as (other, begin_other):
        begin_one()
        begin_other()
        assert same(read_plan(bank, plan), expected)
        for each in (one, other):
            each.join(60)
            assert each.exitcode == 0
    assert folder_digests(bank.folder) == folder_digests(tmp_path / "alone")


def test_a_process_killed_while_it_makes_an_entry_leaves_none(
    bank: BankSource, tmp_path: Path
) -> None:
    """The kernel kills it at the first byte past a file's size limit."""
    with maker(bank, FIRST) as (process, begin):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        begin()
        process.join(60)
    assert process.exitcode == -signal.SIGXFSZ
    assert bank.entry(*DOWN_NF4) is None
    assert not bank.file(*DOWN_NF4).exists()
    sizes = [path.stat().st_size for path in bank.folder.rglob("*") if path.is_file()]
    assert sizes == [4096], "killed as it wrote"
    assert same(read_plan(bank, FIRST), read_plan(replace(bank, folder=tmp_path / "other"), FIRST))


def test_a_full_disk_keeps_no_part_of_an_entry(bank: BankSource, tmp_path: Path) -> None:
    with disk_of("160k", tmp_path / "disk") as disk:
        full = replace(bank, folder=disk)
        read_plan(full, {QKV: "int8"})
        fill(disk, 4096)
        with pytest.raises(StorageError, match=f"no space left for {disk}/nf4/"):
            read_plan(full, PLAN)
        assert set(folder_digests(disk)) - {"filler"} == {
            f"int8/{QKV}.{kind}" for kind in ("json", "safetensors")
        }
        (disk / "filler").unlink()
        assert same(read_plan(full, PLAN), read_plan(bank, PLAN))


def test_a_machine_caches_the_files_it_reads(
    bank: BankSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    tensors = read_plan(bank, FIRST)
    monkeypatch.setenv(BANK_CACHE, str(cache))
    assert same(read_plan(bank, FIRST), tensors)
    (copy,) = cache.glob("*.safetensors")
    path = bank.file(*DOWN_NF4)
    path.write_bytes(b"no longer read")
    assert same(read_plan(bank, FIRST), tensors)
    assert path.read_bytes() == b"no longer read"
    copy.write_bytes(b"damaged")
    assert same(read_plan(bank, FIRST), tensors), "both are damaged"
    assert same(read_plan(bank, FIRST), tensors)
    assert list(cache.glob("*.safetensors")) == [copy]


def test_a_full_cache_keeps_no_partial_file(
    bank: BankSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read_plan(bank, PLAN)
    with disk_of("8k", tmp_path / "cache") as cache:
        monkeypatch.setenv(BANK_CACHE, str(cache))
        with pytest.raises(StorageError, match=f"no space left for {cache}/[0-9a-f]+.safetensors"):
            read_plan(bank, PLAN)
        assert {file.suffix for file in cache.iterdir()} <= {".lock"}


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_the_table_that_computes_logits_is_rounded_by_its_inputs(
    tiny_model: Path, tmp_path: Path, is_tied: bool
) -> None:
    """Embeddings that are not tied only look rows up, and round to nearest."""
    model = load_dense(str(tiny_model), DTYPE)
    model.config.tie_word_embeddings = is_tied
    if not is_tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.save_pretrained(tmp_path / "model")
    bank = replace(bank_source(tmp_path / "model", tmp_path / "bank"), uses_grams=True)
    rows = [{"input_ids": row, "labels": row} for row in token_rows(16, 32)]
    for grams in gather(model, Samples(rows, pad_id=1, batch_size=8)):
        write_grams(bank, grams)
    assert bank.has_grams()
    [(table, gram)] = grams.items()
    assert table == (("model.embed_tokens",) if is_tied else ("lm_head",))
    packing = format_of("q4_0")
    for group in table_paths(model.config):
        path = group_paths(model.config, GROUP)[group]
        weight = model.get_parameter(f"{path[0]}.weight").detach()
        [(_, tensors)] = make_entries(bank, group, ("q4_0",))
        nearest = pack(packing, weight)["weight"]
        calibrated = pack(packing, weight, gram)["weight"]
        assert not torch.equal(nearest, calibrated)
        expected = calibrated if path == table else nearest
        assert torch.equal(tensors[f"{path[0]}.weight"], expected)
