"""The version, and the commit that the code is of: asked of git in a checkout, told by the build in what was installed.

Imports nothing of this package and nothing heavy: `setup.py` runs this file to learn what it builds.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

VERSION = "0.1.0"
_PACKAGE = Path(__file__).resolve().parent.parent
COMMIT_FILE = "commit.txt"
"""What `setup.py` leaves in the package of a wheel or source archive; a checkout has none."""


def commit() -> str | None:
    """Return the commit of this code, with `+modified` where the checkout differs; None where nothing tells it."""
    if (_PACKAGE.parent / ".git").exists():
        try:
            changes = _git("status", "--porcelain", "--untracked-files=no")
            return _git("rev-parse", "--short=12", "HEAD") + ("+modified" if changes else "")
        except (OSError, subprocess.CalledProcessError):
            return None
    left = _PACKAGE / COMMIT_FILE
    return left.read_text().strip() or None if left.exists() else None


def describe() -> str:
    """Name the version for people: `0.1.0 (commit f314f2b0c1d2)`, the number alone where no commit is known."""
    return f"{VERSION} (commit {known})" if (known := commit()) else VERSION


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_PACKAGE.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 (our words)
