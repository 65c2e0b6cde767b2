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
    """Return the commit of this code, with `+modified` where the checkout differs from it.

    Returns:
        None where neither git nor the build tells: an archive without history, a checkout on a machine without git.
    """
    if (_PACKAGE.parent / ".git").exists():
        return _commit_of_checkout(_PACKAGE.parent)
    left = _PACKAGE / COMMIT_FILE
    return left.read_text().strip() or None if left.exists() else None


def describe() -> str:
    """Name the version for people: `0.1.0 (commit f314f2b0c1d2)`, the number alone where no commit is known."""
    known = commit()
    return f"{VERSION} (commit {known})" if known else VERSION


def _commit_of_checkout(root: Path) -> str | None:
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+modified" if changes else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 (our words)
