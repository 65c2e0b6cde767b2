"""Copy this checkout, for tests that build, install or run it as a new user would."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT, run_program


def copy_checkout(into: Path) -> Path:
    """Copy all files that git does not ignore; skip the test if this is no git checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: the files of the project are unknown")
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).exists():  # a deletion that is not committed yet
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    return into


def environment_with(environment: Path, *source: object) -> Path:
    """Make a virtual environment with what `pip install` finds at a source: a wheel, an archive or
    a checkout."""
    run_program(sys.executable, "-m", "venv", "--without-pip", environment)
    [site] = environment.glob("lib/python*/site-packages")
    # Shares the installed dependencies, but not the editable qpruner: .pth files there are not
    # followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python")
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    run_program(*pip, "install", *options, *source)
    return environment


def git(folder: Path, *arguments: str) -> str:
    """Run a git command, and return its output."""
    return run_program("git", "-C", folder, *arguments).stdout.strip()
