"""The row of a model that was fine-tuned unpacked, merged, and then rounded as llama.cpp rounds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import raw_config, with_keys
from safetensors.torch import load_file

from qpruner.config.load import validate_config
from qpruner.export.recode import read_settings, weights_of
from qpruner.pipeline.run import run
from qpruner.report.claim import claim, comparisons
from qpruner.runs.records import BASE, CONFIRMATION, MERGED, ComparisonRecord, ServeRecord
from qpruner.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

KEYS = {
    "training.method": "scales",
    "training.learning_rate": 0.02,
    "prune.rate": 0.0,
    "quantize.bits": None,
    "quantize.formats": ["q4_0", "q5_1"],
    "quantize.embeddings": ["q8_0"],
    "quantize.budget": {"gib": 0.001},
    "sensitivity.methods": ["first_order"],
    "search.max_trials": 3,
    "search.max_concurrent": 1,
    "finetune": {"steps": 8, "compare": True, "seeds": 2, "random_plans": 1},
    "serve.to": ["gguf"],
}


def test_the_merged_row_has_the_bytes_of_llama_cpps_quantizer(
    tiny_model: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    config = validate_config(with_keys(raw_config(tiny_model, tmp_path / "run"), **KEYS))
    results = run(config, lambda event: None)
    run_dir = RunDir(tmp_path / "run")
    record = run_dir.read_record("comparison", ComparisonRecord)
    assert record is not None
    merged = [row for row in record.rows if row.name == MERGED]
    base = [row for row in record.rows if row.name == BASE]
    assert [row.seed for row in merged] == [row.seed for row in base] == [1, 2]

    for row, unpacked in zip(merged, base, strict=True):
        assert row.is_merged and row.trained_sha256 == unpacked.trained_sha256
        assert row.measured_bytes == row.plan_bytes < unpacked.measured_bytes
        assert row.losses[CONFIRMATION].mean != unpacked.losses[CONFIRMATION].mean
        adapter = load_file(
            run_dir.candidates / unpacked.digest / "trained" / "adapter_model.safetensors"
        )
        settings = read_settings(
            run_dir.candidates / unpacked.digest / "trained" / "adapter_config.json"
        )
        weights = weights_of(tiny_model)
        written = weights_of(run_dir.candidates / row.digest / "trained")
        path = "model.layers.0.mlp.down_proj"
        lora = f"base_model.model.{path}.lora"
        change = adapter[f"{lora}_B.weight"].float() @ adapter[f"{lora}_A.weight"].float()
        expected = weights[f"{path}.weight"].float()
        expected = expected + settings["lora_alpha"] / settings["r"] * change
        group = next(name for name in row.plan if name.startswith("layers.0"))
        number_type = gguf.GGMLQuantizationType[row.plan[group].upper()]
        blocks = gguf.quantize(expected.numpy(), number_type)
        assert torch.equal(
            written[f"{path}.weight"], torch.from_numpy(np.ascontiguousarray(blocks))
        )

    other = next(each for each in comparisons(results) if each.other == MERGED)
    assert other.seeds == (1, 2)
    assert "fine-tuning in 16 bits, then quantizing" in claim(results)
    served = run_dir.read_record("serve", ServeRecord)
    assert served is not None
    [row_served] = [row for row in served.rows if row.name == MERGED]
    assert row_served.loss == pytest.approx(merged[0].losses[CONFIRMATION].mean, abs=0.02)
