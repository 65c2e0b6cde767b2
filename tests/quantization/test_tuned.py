"""Tuned rounding: blocks whose codes gradients have changed, and a pass over a plan."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_tensors import normal, same
from mixed_models import bank_source, groups_of

from qpruner.config.schema import TuningConfig
from qpruner.data.calibration import Samples
from qpruner.data.encoding import save_encoded
from qpruner.errors import TrainingDiverged
from qpruner.models.families import block_paths
from qpruner.models.loading import load_dense
from qpruner.plans.plan import EMBEDDINGS
from qpruner.pruning.grams import gather
from qpruner.quantization.assembly import assemble, plan_model
from qpruner.quantization.bank import read_plan, write_grams
from qpruner.quantization.block_tuning import TunedWeight, tune_block
from qpruner.quantization.formats import ScaledFormat, format_of
from qpruner.quantization.rounding import pack, round_together
from qpruner.quantization.tuned import TunedPlan

Rows = list[dict[str, list[int]]]
NAMES = ["q4_0", "q4_1", "q5_0", "w2_g32", "w3", "w4_hqq"]


def scaled(name: str) -> ScaledFormat:
    packing = format_of(name)
    assert isinstance(packing, ScaledFormat)
    return packing


@pytest.mark.parametrize("name", NAMES)
def test_an_untuned_weight_is_that_of_gptq(name: str) -> None:
    weight = normal(24, 128) * 0.05
    inputs = normal(400, 128, seed=1)
    gram = inputs.T @ inputs
    packing = scaled(name)
    [rounded] = round_together(packing, [weight], gram)
    expected = pack(packing, weight, gram)
    tuned = TunedWeight(packing, rounded)
    assert same(tuned.packed(), expected)
    values = packing.unpack(expected, 128, torch.float32)
    assert torch.allclose(tuned(torch.float32), values, rtol=1e-5, atol=1e-7)
    latents = rounded.latents
    assert not torch.allclose(latents, weight, atol=1e-4), "they make up for errors"
    differences = (latents - values).view(24, -1, packing.group_size)
    steps = (differences / rounded.scales.unsqueeze(2)).abs()
    assert float(steps.median()) < 0.5, "codes are rounded from them"


@pytest.mark.parametrize("name", sorted({*NAMES} - {"w2_g32"}))
def test_outputs_come_closer_to_the_targets(name: str) -> None:
    """Inputs are off, as behind quantized blocks; the outputs judged are of none that it saw.

    Two bits gain nothing here: the steps between their four values are too coarse.
    """
    packing = scaled(name)
    weight = normal(64, 128) * 0.05
    exact = torch.relu(normal(8 * 200, 128, seed=1) @ normal(128, 128, seed=2) / 8)
    shifted = exact * (1 + 0.2 * torch.sign(normal(1, 128, seed=9)))
    [rounded] = round_together(packing, [weight], exact.T @ exact)
    tuned = TunedWeight(packing, rounded)
    inputs = shifted.split(200)
    targets = [torch.tanh(3 * batch @ weight.T) for batch in exact.split(200)]

    def outputs(batch: int, values: torch.Tensor) -> torch.Tensor:
        return torch.tanh(3 * inputs[batch] @ values.T)

    def error() -> float:
        values = packing.unpack(tuned.packed(), 128, torch.float32)
        return float((outputs(-1, values) - targets[-1]).norm())

    before = error()
    tune_block(
        {"weight": tuned},
        lambda batch, values: outputs(batch, values["weight"]),
        targets[:-1],
        TuningConfig(iterations=60),
        torch.float32,
        seed=0,
    )
    assert error() < 0.9 * before


def test_outputs_that_are_not_finite_are_told() -> None:
    packing = scaled("q4_0")
    [rounded] = round_together(packing, [normal(8, 32)], torch.eye(32))
    with pytest.raises(TrainingDiverged, match="outputs of a block are NaN or infinite"):
        tune_block(
            {"weight": TunedWeight(packing, rounded)},
            lambda batch, values: values["weight"] * torch.inf,
            [torch.zeros(8, 32)],
            TuningConfig(),
            torch.float32,
            seed=0,
        )


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> TunedPlan:
    """A plan of several formats, with the Gram matrices of its bank."""
    folder = tmp_path_factory.mktemp("tuned")
    save_encoded(rows, folder / "data" / "train")
    plain = bank_source(tiny_model, folder / "bank", dtype="bfloat16")
    bank = replace(plain, uses_grams=True, inputs="grams", method="scales")
    for grams in gather(load_dense(str(tiny_model), "bfloat16"), Samples(rows, 1, 4)):
        write_grams(bank, grams)
    names = ["w2_g32", "q4_0", "bf16", "q8_0"]
    groups = groups_of(bank)
    plan = {EMBEDDINGS: "q8_0"}
    plan |= {group: names[place % len(names)] for place, group in enumerate(groups)}
    settings = TuningConfig(iterations=12, rows=16)
    return TunedPlan(bank, plan, folder / "plan", "digest", folder / "data", settings)


def told(tuned: TunedPlan) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    tuned.tune(lambda done, total: seen.append((done, total)))
    return seen


def test_a_pass_tunes_what_has_scales_and_less_than_8_bits(tuned: TunedPlan) -> None:
    assert not tuned.is_done
    assert told(tuned) == [(1, 2), (2, 2)]
    assert tuned.is_done
    config = load_dense(str(tuned.bank.checkpoint), "bfloat16").config
    made = tuned.read(config)
    entries = read_plan(tuned.bank, tuned.plan)
    assert made.keys() < entries.keys()
    assert all(made[name].shape == entries[name].shape for name in made)
    changed = [name for name in made if not torch.equal(made[name], entries[name])]
    assert len(changed) > len(made) / 2
    assert not any("embed" in name for name in made)
    tensors = assemble(tuned.bank, tuned.plan, tuned=tuned)[0].state_dict()
    for name, entry in entries.items():
        assert torch.equal(tensors[name], made.get(name, entry))


def test_a_block_lost_by_a_kill_is_the_only_one_tuned_again(tuned: TunedPlan) -> None:
    """A process is killed after its first block; a byte of another's file is flipped."""
    if not tuned.is_done:
        told(tuned)
    first, second = map(
        tuned.file, block_paths(load_dense(str(tuned.bank.checkpoint), "bfloat16").config)
    )
    expected = [file.read_bytes() for file in (first, second)]
    program = (
        "import pickle, sys, time; tuned = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "tuned.tune(lambda done, total: time.sleep(600))"
    )
    other = replace(tuned, folder=tuned.folder.with_name("killed"))
    process = subprocess.Popen([sys.executable, "-c", program, pickle.dumps(other).hex()])
    records = [other.file(file.stem).with_suffix(".json") for file in (first, second)]
    deadline = time.monotonic() + 120
    while not records[0].exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert records[0].exists()
    assert not records[1].exists()
    assert not other.is_done
    made = other.file(first.stem).stat().st_mtime_ns
    told(other)
    assert [other.file(file.stem).read_bytes() for file in (first, second)] == expected
    assert other.file(first.stem).stat().st_mtime_ns == made

    damaged = bytearray(expected[1])
    damaged[-1] ^= 1
    other.file(second.stem).write_bytes(damaged)
    config = load_dense(str(tuned.bank.checkpoint), "bfloat16").config
    assert same(other.read(config), tuned.read(config)), "whoever reads it tunes it again"


def test_adapters_start_anew_beside_tuned_codes(tuned: TunedPlan) -> None:
    """Those of an entry make up for the errors of other codes."""
    bank = replace(tuned.bank, method="adapter", folder=tuned.bank.folder)
    model = plan_model(bank, tuned.plan, seed=0, tuned=replace(tuned, bank=bank))
    made = tuned.read(model.config)
    for name in made:
        layer = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        assert not layer.lora_B["default"].weight.any()
