"""The speed that hours are estimated by is that of this device, in the configuration's dtype."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qpruner.config.schema import LoraConfig
from qpruner.estimate import work
from qpruner.estimate.matmul_speed import operations_per_second, packing_operations, packing_per_second
from qpruner.models.cpu import has_bfloat16
from qpruner.quantization.bank import Entry, EntrySettings, build_entry

TIMED = """
from qpruner.estimate.matmul_speed import operations_per_second
print(operations_per_second(512, 512, 256, "bfloat16", 1, 1))
"""
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def timed(**environment: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", TIMED], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return float(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16 instructions to do without")
def test_a_cpu_without_bfloat16_instructions_is_known_to_be_slower() -> None:
    """Products took 500 and 110 GFLOP/s, so that two processes on a busy machine still tell them apart."""
    assert timed(**AVX2) < timed() / 1.5


def test_slots_are_timed_side_by_side() -> None:
    """In threads of their own, which leave this process's number of threads alone; asked again, nothing is timed."""
    threads = torch.get_num_threads()
    alone = operations_per_second(256, 256, 256, "float32", 1, 1)
    assert alone == operations_per_second(256, 256, 256, "float32", 1, 1)
    shared = operations_per_second(256, 256, 256, "float32", 1, 2)
    assert alone > 1e8 and shared > 1e8
    assert torch.get_num_threads() == threads


def test_packing_is_known_to_be_slower_than_products() -> None:
    """Taken for products, the demo's bank took a second, which took half a minute."""
    settings = EntrySettings(LoraConfig(rank=8), double_quant=True, seed=0)
    packing = packing_per_second(512, 512, settings, (4, 8), "float32", 1, 1)
    assert packing < operations_per_second(512, 512, 128, "float32", 1, 1) / 3
    assert packing_operations(10, 20, settings.lora, 2) == 2 * packing_operations(10, 20, settings.lora, 1)


def test_one_alternation_of_a_small_layer_is_packed_whatever_loftq_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact SVDs of 1024 x 1024 in five alternations kept `check` busy for ten seconds."""
    packed: list[tuple[int, torch.Size]] = []

    def build(weights: dict[str, torch.Tensor], bits: int, settings: EntrySettings) -> Entry:
        packed.append((settings.lora.loftq_iterations, weights[""].shape))
        return build_entry(weights, bits, settings)

    monkeypatch.setattr("qpruner.estimate.matmul_speed.build_entry", build)
    lora = LoraConfig(rank=8, svd="exact", loftq_iterations=5)
    packing_per_second(4096, 4096, EntrySettings(lora, double_quant=True, seed=0), (4, 8), "float32", 1, 1)
    assert set(packed) == {(1, (512, 512))}


def test_what_a_step_does_beside_the_products_weighs_more_on_narrow_models() -> None:
    narrow, wide = (work.cpu_rates(5e11, width, 1, "made up") for width in (256, 2048))
    assert narrow.training < wide.training < 5e11
    assert narrow.training == pytest.approx(1 / (1 / 5e11 + 2.5e-9 / 256))
    assert work.cpu_rates(1e12, 256, 2, "made up").training == pytest.approx(2 * narrow.training)
    assert "500 GFLOP/s, about 85 with what else a step does" in narrow.origin
