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
        command = [
            "git",
            "-C",
            str(_PACKAGE.parent),
            "describe",
            "--always",
            "--exclude=*",
            "--abbrev=12",
        ]
        try:
            run = subprocess.run(
                [*command, "--dirty=+modified"], capture_output=True, text=True, check=True
            )  # noqa: S603
            return run.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None
    file = _PACKAGE / COMMIT_FILE
    return file.read_text().strip() or None if file.exists() else None


def describe() -> str:
    """Return the version for people, such as `0.1.0 (commit f314f2b0c1d2)`.

    It is only the number if the commit is unknown.
    """
    return f"{VERSION} (commit {known})" if (known := commit()) else VERSION
