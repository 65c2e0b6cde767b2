"""`benchmarks/gpu_7b.py` and its kit, with a tiny shape on the CPU: by the very functions that run on a GPU."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABSENT = "ray datasets pyarrow pandas lm_eval scipy sklearn botorch gpytorch hyperopt matplotlib tensorboardX boto3"
"""What qpruner installs with, and a machine with the kit lacks."""


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=600
    )


def lines_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]


def test_all_parts_run_without_ray_and_datasets(tmp_path: Path) -> None:
    """And one that fails, for want of an earlier one, says so and ends nothing."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys('{ABSENT}'.split()))\n")
    parts = script("gpu_7b").PARTS
    command = (sys.executable, "benchmarks/gpu_parts.py", "bank", *parts, "--shape", "tiny", "--work", tmp_path / "w")
    done = run(*command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr
    failed, *lines = lines_of(tmp_path / "w")
    assert "part prune" in failed["error"]
    assert [line["part"] for line in lines] == list(parts)
    assert [line["error"] for line in lines if "error" in line] == []
    pruned, bank, trial, finetune, memory, estimates, tests = lines
    assert abs(1 - pruned["after"] / pruned["before"] - 0.2) < 0.02
    assert bank["entries"] == 4 and 0 < bank["residual_ratio"] < 1
    assert len(trial["losses"]) == 2 and trial["training_and_scoring"] > 0
    assert finetune["qpruner_tokens_a_second"] > 0 and finetune["plain_tokens_a_second"] > 0
    assert sum(name.endswith("_bytes") and value > 0 for name, value in memory.items() if value) == 4
    compared = [value for name, value in estimates.items() if name.endswith(("_seconds", "_memory"))]
    assert len(compared) == 6 and all(min(each.values()) > 0 for each in compared), estimates
    assert tests["failed"] == [] and "collected" in tests["summary"], "tests marked gpu need no Ray"


def test_a_part_out_of_time_is_ended_and_says_so(tmp_path: Path) -> None:
    command = ("benchmarks/gpu_7b.py", "--shape", "tiny", "--part", "prune", "bank", "--minutes", 0.01)
    done = run(sys.executable, *command, "--work", tmp_path)
    first, second = lines_of(tmp_path)
    assert "took longer" in first["error"] and "--minutes" in second["error"]
    assert json.loads(done.stdout.splitlines()[-1])["parts"] == [first, second]
    assert not (tmp_path / "pruned").exists()


def made_wheel(folder: Path) -> Path:
    """Named and laid out as bitsandbytes' own, with a few bytes for every library."""
    info, kinds = "bitsandbytes-0.1.dist-info", ("cpu", "cuda118", "cuda128", "rocm70", "xpu2025")
    files = {f"bitsandbytes/libbitsandbytes_{kind}.so": kind for kind in kinds} | {
        "bitsandbytes/__init__.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{name},sha256={hashed(text.encode())},{len(text)}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]) + "\n"
    wheel = folder / "bitsandbytes-0.1-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def hashed(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def test_the_kit_keeps_one_cuda_library(tmp_path: Path) -> None:
    kit, wheel = script("gpu_kit"), made_wheel(tmp_path)
    with pytest.raises(SystemExit, match="no library for CUDA 999: give one of 118, 128"):
        kit.keep_one_library(wheel, "999")
    kit.keep_one_library(wheel, "128")
    with ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert {Path(name).stem for name in files if name.endswith(".so")} == {
        "libbitsandbytes_cpu",
        "libbitsandbytes_cuda128",
    }
    (record,) = (name for name in files if name.endswith("RECORD"))
    listed = {name: sha256 for name, sha256, _ in csv.reader(files.pop(record).decode().splitlines())}
    assert listed.pop(record) == ""
    assert listed == {name: f"sha256={hashed(content)}" for name, content in files.items()}
    options = ("--quiet", "--no-index", "--no-deps", "--target", tmp_path / "site")
    installed = run(sys.executable, "-m", "pip", "install", *options, wheel)
    assert installed.returncode == 0, installed.stderr
    assert (tmp_path / "site" / "bitsandbytes" / "libbitsandbytes_cuda128.so").read_text() == "cuda128"


@pytest.mark.slow
def test_the_kit_runs_beside_torch_and_numpy_alone(tmp_path: Path) -> None:
    """The machine that it is for, but for its GPU."""
    kit, folder, bare = script("gpu_kit"), tmp_path / "kit", tmp_path / "bare"
    if run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path, "click").returncode:
        pytest.skip("no package index answers")
    made = run(sys.executable, "benchmarks/gpu_kit.py", "128", "--out", folder)
    assert made.returncode == 0, made.stdout + made.stderr
    run(sys.executable, "-m", "venv", bare)
    link_packages(kit.required(kit.THERE), bare)
    python = bare / "bin" / "python"
    installed = run("bash", folder / "install.sh", python, PYTHONPATH="")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    command = (python, folder / "benchmarks" / "gpu_7b.py", "--shape", "tiny", "--work", tmp_path / "w")
    done = run(*command, PYTHONPATH=str(folder / "site"))
    *lines, tests = lines_of(tmp_path / "w")
    assert [line["error"] for line in lines if "error" in line] == [], done.stderr
    assert "pytest is not installed" in tests["error"]


def link_packages(names: list[str], environment: Path) -> None:
    """Show an environment some of this one's packages."""
    (site,) = environment.glob("lib/python*/site-packages")
    for name in names:
        for top in {
            file.parts[0] for file in distribution(name).files or () if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (site / top).exists():
                (site / top).symlink_to(Path(sysconfig.get_path("purelib"), top))
