"""The version and commit of this code.

`setup.py` runs this file, so it imports only the standard library.
"""

import subprocess
from pathlib import Path

VERSION = "0.1.0"
_PACKAGE = Path(__file__).resolve().parent.parent
COMMIT_FILE = "commit.txt"
"""File that `setup.py` writes into the package of a wheel or source archive; a checkout has none.
"""


def commit() -> str | None:
    """Return the commit of this code, with `+modified` if the checkout has changes.

    Return None if the commit is unknown.
    """
    if (_PACKAGE.parent / ".git").exists():
        command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+modified"]
        try:
            return subprocess.check_output(  # noqa: S603
                command, cwd=_PACKAGE.parent, stderr=subprocess.DEVNULL, text=True
            ).strip()
        except (OSError, subprocess.CalledProcessError):
            return None
    file = _PACKAGE / COMMIT_FILE
    if not file.exists():
        return None
    return file.read_text().strip() or None


def describe() -> str:
    """Return the version for people, such as `0.1.0 (commit f314f2b0c1d2)`.

    It is only the number if the commit is unknown.
    """
    known_commit = commit()
    return f"{VERSION} (commit {known_commit})" if known_commit else VERSION
