"""The machines of these tests begin with an environment that `launch/setup.sh` takes for its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from machines import ROOT, frozen_versions, link_environment


@pytest.mark.parametrize("is_worker", [False, True])
def test_nothing_is_installed_on_them(is_worker: bool, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    constraints = frozen_versions() if is_worker else b""
    link_environment(tmp_path, constraints)
    environment = {"PATH": os.environ["PATH"], "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    if is_worker:
        (tmp_path / "versions.txt").write_bytes(constraints)
        environment["PIP_CONSTRAINT"] = str(tmp_path / "versions.txt")
    setup = ["bash", "launch/setup.sh", "cluster"]
    done = subprocess.run(setup, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "== .venv has qpruner[cluster] already\n"), done.stderr
