"""The launch scripts fail early with a clear message on unprepared machines."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, disk_of, run_program

TOOLS = ("bash", "dirname", "df", "awk", "cat", "sed", "env", "sha256sum")
UNREACHABLE = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_RETRIES": "0",
    "PIP_NO_CACHE_DIR": "1",
}
"""Variables for an unreachable package index: nothing listens at port 9 of this machine."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that the scripts need."""
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


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def setup(
    checkout: Path, path: str, code: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": path, "HOME": str(checkout), **environment}
    script = ("bash", "launch/setup.sh", "demo")
    return run_program(*script, code=code, folder=checkout, environment=variables)


@pytest.mark.parametrize(
    ("version", "problem"), [(None, "python3 was not found"), ("3.9.2", "3.9.2 is too old")]
)
def test_a_missing_or_old_python_is_named(
    version: str | None, problem: str, checkout: Path, bare_path: Path
) -> None:
    if version:
        program(
            bare_path / "python3",
            f'[ "$1" = --version ] && echo "Python {version}" && exit 0\nexit 1',
        )
    done = setup(checkout, str(bare_path))
    assert f"{problem}; install Python 3.11 or newer" in done.stderr


@pytest.mark.slow
def test_other_versions_are_installed_again(checkout: Path, tmp_path: Path) -> None:
    """Workers of a cluster install the versions of their head; here without a network."""
    versions = tmp_path / "versions.txt"
    versions.write_text("idna==3.10\n")
    asked = (checkout / "pyproject.toml").read_bytes() + versions.read_bytes() + b"demo "
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "qpruner-installed-demo").write_text(hashlib.sha256(asked).hexdigest())
    given = {"PIP_CONSTRAINT": str(versions), **UNREACHABLE}
    done = setup(checkout, os.environ["PATH"], code=0, **given)
    assert done.stdout == "== .venv has qpruner[demo] already\n"
    versions.write_text("idna==3.11\n")
    done = setup(checkout, os.environ["PATH"], **given)
    # This time pip was asked.
    assert "== installing qpruner[demo]" in done.stdout
    assert "cannot reach a package index" in done.stderr or "the message is above" in done.stderr


def test_uv_gets_the_settings_of_pip(tmp_path: Path) -> None:
    """Translate pip's files and variables, but keep uv's own; with a setting that uv lacks, pip
    installs."""
    (tmp_path / "pip.conf").write_text(
        "[global]\ntimeout = 7\nfind-links = /a /b\n[install]\nno-index = true\n"
    )
    paths = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}

    python = sys.executable
    script = f"{python} -m pip config list | {python} {ROOT}/launch/uv_settings.py"

    def translated(code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        return run_program("bash", "-c", script, code=code, environment=paths | more)

    found = translated(**UNREACHABLE, UV_NO_INDEX="0").stdout.splitlines()
    given = (f"DEFAULT_INDEX={UNREACHABLE['PIP_INDEX_URL']}", "FIND_LINKS=/a,/b", "HTTP_TIMEOUT=7")
    assert {f"export UV_{each}" for each in given} <= {*found}
    assert not any("UV_NO_INDEX" in line for line in found)
    refused = translated(code=1, PIP_PREFER_BINARY="1")
    assert refused.stdout == ""
    assert "`prefer-binary`, so pip installs" in refused.stderr


def test_a_disk_without_room_is_refused(checkout: Path, tmp_path: Path) -> None:
    with disk_of("16m", tmp_path / "small") as disk:
        shutil.copytree(checkout, disk / "checkout")
        done = setup(disk / "checkout", os.environ["PATH"])
    assert "the installation takes up to 8 GB, but only" in done.stderr


def test_the_test_script_says_how_long_it_takes(checkout: Path, bare_path: Path) -> None:
    program(bare_path / "nproc", "echo 4")
    done = run_program(
        "bash", "launch/test.sh", code=1, folder=checkout, environment={"PATH": str(bare_path)}
    )
    assert re.match(r"== about \d+ minutes on 4 cores, ", done.stdout), done.stderr


def test_ci_runs_the_test_script_and_nothing_else() -> None:
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert commands[-1] == "exec bash launch/test.sh"
    assert len(commands) == 3
