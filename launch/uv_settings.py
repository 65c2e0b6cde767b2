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
"""uv's variable for a setting of pip; several values are separated by blanks, of UV_FIND_LINKS by
commas."""
NO_MATTER = {
    "disable-pip-version-check",
    "no-input",
    "no-color",
    "quiet",
    "verbose",
    "progress-bar",
    "retries",
}
NO_MATTER |= {
    "no-cache-dir",
    "cache-dir",
    "require-virtualenv",
    "break-system-packages",
    "config-file",
}


def refuse(why: str) -> None:
    """End, so that pip installs."""
    sys.exit(f"== {why}, so pip installs")


found = {
    "UV_INDEX_STRATEGY": "unsafe-best-match",
    "UV_NATIVE_TLS": "1",
}  # as pip: newest of all indexes, certificates
lines = [line.partition("=") for line in sys.stdin.read().splitlines()]
for section in ("global.", "install.", ":env:."):  # later ones win
    own: dict[str, str] = {}
    for name, value in (
        (key.removeprefix(section), value) for key, _, value in lines if key.startswith(section)
    ):
        values = [os.path.expanduser(each) for each in str(ast.literal_eval(value)).split()]
        if not values or name in NO_MATTER:
            continue
        if name not in SAME:
            refuse(f"uv has no setting as pip's `{name}`")
        text = ("," if name == "find-links" else " ").join(values)
        if own.setdefault(SAME[name], text) != text:  # pip lists files by name, not in their order
            refuse(f"two files set pip's `{name}`")
    found |= own
for name, value in found.items():
    if name not in os.environ:
        print(f"export {name}={shlex.quote(value)}")
