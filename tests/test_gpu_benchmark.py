"""`benchmarks/gpu_7b.py` and its kit with a tiny model on the CPU, through the same functions as on
a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Raw

ABSENT = (
    "ray datasets pyarrow pandas lm_eval scipy sklearn botorch gpytorch hyperopt "
    "matplotlib tensorboardX boto3"
)
"""Dependencies of qpruner that a machine with the kit lacks."""


def script(name: str) -> Any:
    """Import a script of benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec.loader
    # dataclasses look their module up
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )


def lines_of(work: Path) -> list[Raw]:
    return [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_parts_run_without_ray_and_datasets(tmp_path: Path) -> None:
    """A part that fails because an earlier one is missing is reported, and the others still run."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys('{ABSENT}'.split()))\n"
    )
    parts = script("gpu_7b").PARTS
    command = (
        sys.executable,
        "benchmarks/gpu_parts.py",
        "bank",
        *parts,
        "--shape",
        "tiny",
        "--work",
        tmp_path / "w",
    )
    done = run(*command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr
    failed, *lines = lines_of(tmp_path / "w")
    assert "part prune" in failed["error"]
    assert [line["part"] for line in lines] == list(parts)
    assert [line["error"] for line in lines if "error" in line] == []
    estimates, tests = lines[-2:]
    compared = {
        name: value for name, value in estimates.items() if name.endswith(("_seconds", "_memory"))
    }
    assert len(compared) == 5 and all(min(each.values()) > 0 for each in compared.values()), (
        estimates
    )
    # Tests marked gpu need no Ray.
    assert tests["failed"] == []
    assert "collected" in tests["summary"]


def test_a_part_out_of_time_is_ended_and_says_so(tmp_path: Path) -> None:
    command = (
        "benchmarks/gpu_7b.py",
        "--shape",
        "tiny",
        "--part",
        "prune",
        "bank",
        "--minutes",
        0.01,
    )
    done = run(sys.executable, *command, "--work", tmp_path)
    first, second = lines_of(tmp_path)
    assert "took longer" in first["error"]
    assert "--minutes" in second["error"]
    assert json.loads(done.stdout.splitlines()[-1])["parts"] == [first, second]
    assert not (tmp_path / "pruned").exists()


@pytest.mark.slow
def test_the_kit_needs_only_torch_and_numpy(tmp_path: Path) -> None:
    """As on the machine that the kit is for, except for the GPU."""
    kit = script("gpu_kit")
    folder = tmp_path / "kit"
    bare = tmp_path / "bare"
    if run(
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path, "click"
    ).returncode:
        pytest.skip("no package index answers")
    made = run(sys.executable, "benchmarks/gpu_kit.py", "128", "--out", folder)
    assert made.returncode == 0, made.stdout + made.stderr
    run(sys.executable, "-m", "venv", bare)
    [site] = bare.glob("lib/python*/site-packages")
    for name in kit.required(kit.THERE):
        for top in {file.parts[0] for file in distribution(name).files or ()} - {
            "..",
            "__pycache__",
        }:
            if not (site / top).exists():
                (site / top).symlink_to(Path(sysconfig.get_path("purelib"), top))
    python = bare / "bin" / "python"
    installed = run("bash", folder / "install.sh", python, PYTHONPATH="")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    command = (
        python,
        folder / "benchmarks" / "gpu_7b.py",
        "--shape",
        "tiny",
        "--work",
        tmp_path / "w",
    )
    done = run(*command, PYTHONPATH=str(folder / "site"))
    *lines, tests = lines_of(tmp_path / "w")
    assert [line["error"] for line in lines if "error" in line] == [], done.stderr
    assert "pytest is not installed" in tests["error"]
