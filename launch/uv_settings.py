"""Translates the settings of pip, which uv does not read, into exports of uv's variables.

Usage: eval "$(pip config list | python launch/uv_settings.py)"

The settings come from pip's files and from PIP_ variables. Exit status 1 means that uv has no
equivalent of these settings.
"""

import ast
import os
import shlex
import sys

SAME = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_EXTRA_INDEX_URL",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "no-index": "UV_NO_INDEX",
    "cert": "SSL_CERT_FILE",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
"""uv's variable for a setting of pip.

Several values are separated by blanks, and those of UV_FIND_LINKS by commas.
"""
NO_MATTER = {
    "disable-pip-version-check",
    "no-input",
    "no-color",
    "quiet",
    "verbose",
    "progress-bar",
    "retries",
    "no-cache-dir",
    "cache-dir",
    "require-virtualenv",
    "break-system-packages",
    "config-file",
}
"""Settings of pip that change nothing about what is installed."""


def refuse(why: str) -> None:
    """End, so that pip installs."""
    sys.exit(f"== {why}, so pip installs")


# As pip does it: take the newest version of all indexes, and use the certificates of the system.
variables = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_NATIVE_TLS": "1"}
lines = sys.stdin.read().splitlines()
for section in ("global.", "install.", ":env:."):  # later ones win
    of_section: dict[str, str] = {}
    for line in lines:
        if not line.startswith(section):
            continue
        name, _, value = line.removeprefix(section).partition("=")
        values = [os.path.expanduser(word) for word in str(ast.literal_eval(value)).split()]
        if not values or name in NO_MATTER:
            continue
        if name not in SAME:
            refuse(f"uv has no setting as pip's `{name}`")

        separator = "," if name == "find-links" else " "
        text = separator.join(values)
        # pip lists its files by name, and not in the order in which they count.
        if of_section.setdefault(SAME[name], text) != text:
            refuse(f"two files set pip's `{name}`")
    variables |= of_section

for name, value in variables.items():
    if name not in os.environ:
        print(f"export {name}={shlex.quote(value)}")
