"""The launch scripts fail early and say why, on the machines that newcomers have."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "dirname", "df", "awk", "cat", "sed", "env", "sha256sum")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts need."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy2(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A PATH with the ordinary tools and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (folder / tool).symlink_to(found)
    return folder


def setup(checkout: Path, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/setup.sh", "demo"],
        cwd=checkout,
        env={"PATH": path, "HOME": str(checkout), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_no_python(checkout: Path, bare_path: Path) -> None:
    done = setup(checkout, str(bare_path))
    assert done.returncode == 1
    assert "python3 was not found; install Python 3.11 or newer" in done.stderr


def test_old_python(checkout: Path, bare_path: Path) -> None:
    old = bare_path / "python3"
    old.write_text('#!/bin/bash\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = setup(checkout, str(bare_path))
    assert done.returncode == 1
    assert "Python 3.9.2 is too old; install Python 3.11 or newer" in done.stderr


def test_new_versions_of_the_head_are_installed_again(checkout: Path, tmp_path: Path) -> None:
    """As on a cluster, whose workers have the versions of their head as constraints."""
    versions = tmp_path / "versions.txt"
    versions.write_text("idna==3.10\n")
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}

    def again() -> subprocess.CompletedProcess[str]:
        return setup(checkout, os.environ["PATH"], PIP_CONSTRAINT=str(versions), **unreachable)

    asked = (checkout / "pyproject.toml").read_bytes() + versions.read_bytes() + b"demo "
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "qpruner-installed-demo").write_text(hashlib.sha256(asked).hexdigest())
    done = again()
    assert (done.returncode, done.stdout) == (0, "== .venv has qpruner[demo] already\n"), done.stderr
    versions.write_text("idna==3.11\n")
    done = again()
    assert done.returncode == 1 and "== installing qpruner[demo]" in done.stdout, "pip was asked"


def test_no_network(checkout: Path) -> None:
    # Nothing listens at port 9 of this machine: the same as an index out of reach.
    done = setup(
        checkout, os.environ["PATH"], PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0", PIP_NO_CACHE_DIR="1"
    )
    assert done.returncode == 1
    assert "cannot reach a package index" in done.stderr or "pip's own message is above" in done.stderr


@pytest.fixture
def small_disk(checkout: Path, tmp_path: Path) -> Iterator[Path]:
    """The checkout on a file system of 16 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        shutil.copytree(checkout, mount / "checkout")
        yield mount / "checkout"
    finally:
        subprocess.run(["umount", mount], check=True)


def test_no_disk(small_disk: Path) -> None:
    done = setup(small_disk, os.environ["PATH"])
    assert done.returncode == 1
    assert "the installation takes up to 8 GB, but only" in done.stderr


def test_the_test_script_says_how_long_it_takes(checkout: Path, bare_path: Path) -> None:
    (bare_path / "nproc").write_text("#!/bin/bash\necho 4\n")
    (bare_path / "nproc").chmod(0o755)
    command = ["bash", "launch/test.sh"]
    done = subprocess.run(command, cwd=checkout, env={"PATH": str(bare_path)}, capture_output=True, text=True)
    assert re.match(r"== about \d+ minutes on 4 cores, ", done.stdout), done.stderr


def test_ci_runs_the_test_script_and_nothing_else() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec bash launch/test.sh"
    assert len(commands) == 3
