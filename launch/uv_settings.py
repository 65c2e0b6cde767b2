"""Translate the settings of pip (files and PIP_ variables) that uv does not read: print uv's variables, for `env`.

Usage: pip config list | python launch/uv_settings.py     Exit status 1: a setting is none of those below, so pip is to
install.
"""

import ast
import os
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
"""uv's variable for a setting of pip; several values are separated by blanks, of UV_FIND_LINKS by commas."""
NO_MATTER = {"disable-pip-version-check", "no-input", "no-color", "quiet", "verbose", "progress-bar", "retries"}
NO_MATTER |= {"no-cache-dir", "cache-dir", "require-virtualenv", "break-system-packages", "config-file"}

lines = [line.partition("=") for line in sys.stdin.read().splitlines()]
found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip, the newest version of all indexes
for section in ("global.", "install.", ":env:."):  # later ones win
    for name, value in ((key.removeprefix(section), value) for key, _, value in lines if key.startswith(section)):
        if name in SAME:
            values = str(ast.literal_eval(value)).split()
            found[SAME[name]] = ("," if name == "find-links" else " ").join(values)
        elif name not in NO_MATTER:
            sys.exit(f"== uv has no setting as pip's `{name}`, so pip installs")
given = (f"{name}={value}" for name, value in found.items() if name not in os.environ)
print("\n".join(["PYTHONWARNINGS=ignore", *given]))  # a line at least
