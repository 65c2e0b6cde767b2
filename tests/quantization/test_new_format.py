"""A new format is one file: added to a copy of the package, it is searched, reported and loaded
again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import raw_config, with_keys

import qpruner

FIVE_BITS = '''
"""Five bits with a scale for every 32 weights: eight codes in five bytes."""

from dataclasses import dataclass

from qpruner.quantization.formats.format import GridFormat


@dataclass(frozen=True, kw_only=True)
class FiveBits(GridFormat):
    """Codes, then scales in float32."""

    def packed_bytes(self, rows, columns, element_bytes):
        return rows * (columns * 5 // 8 + columns // 32 * 4)

    def refusal(self, columns, capability):
        return f"{columns} columns do not divide by 32" if columns % 32 else None

    def grid(self, weight):
        scale = weight.abs().amax(dim=-1, keepdim=True) / 15
        return scale, scale.new_full(scale.shape, 16)

    def store(self, codes, scales, zeros):
        import torch

        shifts = torch.arange(0, 40, 5)
        words = (codes.long().reshape(len(codes), -1, 8) << shifts).sum(dim=-1, keepdim=True)
        packed = words.view(torch.uint8)[..., :5].reshape(len(codes), -1)
        return {"weight": torch.cat([packed, scales.contiguous().view(torch.uint8)], dim=1)}

    def unpack(self, tensors, columns, dtype):
        import torch

        packed = tensors["weight"]
        shifts = torch.arange(0, 40, 5)
        split = columns * 5 // 8
        words = torch.zeros(len(packed), columns // 8, 8, dtype=torch.uint8)
        words[..., :5] = packed[:, :split].reshape(len(packed), -1, 5)
        codes = (words.view(torch.int64) >> shifts) & 31
        scales = packed[:, split:].contiguous().view(torch.float32)
        weight = (codes.reshape(len(packed), -1, 32) - 16) * scales[..., None]
        return weight.reshape(len(packed), columns).to(dtype)


FIVE = FiveBits(name="five", bits=5, letter="5", colour="#884488", group_size=32, num_codes=32)
'''
LOAD = """
import sys, torch, qpruner.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
packed = {each.format.name for each in model.modules() if hasattr(each, "format")}
logits = model(torch.tensor([[1, 2, 3]])).logits
assert logits.isfinite().all()
print(sorted(packed))
"""


@pytest.mark.slow  # a whole run
def test_a_format_in_one_file_is_searched_and_loaded(tiny_model: Path, tmp_path: Path) -> None:
    package = shutil.copytree(Path(qpruner.__file__).parent, tmp_path / "package" / "qpruner")
    (package / "quantization" / "formats" / "five.py").write_text(FIVE_BITS.lstrip())
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    keys = {
        "quantize": {
            "group": "block",
            "formats": ["five", "int8"],
            "embeddings": ["five"],
            "rounding": "gptq",
        },
        "search.max_trials": 5,
        "sensitivity.methods": ["fisher"],
        "finetune.compare": False,
    }
    run = tmp_path / "run"
    raw = with_keys(raw_config(tiny_model, run), **keys)
    raw["quantize"]["budget"] = {"bytes": 195_000}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python("-m", "qpruner", "run", "config.yaml")
    assert (run / "banks" / "cut-20" / "five" / "layers.0.safetensors").exists()
    trials = [json.loads(path.read_text()) for path in run.glob("trials/*/*/trial.json")]
    assert any(set(trial["plan"].values()) == {"five", "int8"} for trial in trials)
    assert all(
        trial["plan"]["embeddings"] == "five" for trial in trials if trial["status"] == "finished"
    )
    assert "five" in (run / "report.html").read_text()
    assert "'five'" in python("-c", LOAD, str(run / "final"))
