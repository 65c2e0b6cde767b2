#!/usr/bin/env bash
# Makes .venv in the project's root and installs qpruner with some extras; does nothing if they are installed already.
# Usage: bash launch/setup.sh EXTRAS [GROUP]     (demo.sh and test.sh call it)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:?which extras of pyproject.toml, such as demo}
group=${2:-}

fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

python=""
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3; do
  if command -v "$candidate" >/dev/null 2>&1 &&
     "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  command -v python3 >/dev/null 2>&1 || fail "python3 was not found; install Python 3.11 or newer"
  fail "$(python3 --version 2>&1) is too old; install Python 3.11 or newer, or name one: PYTHON=/path/to/python bash $0"
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"

# The installation depends on pyproject.toml, the extras, and the constraints of pip. By the constraints, the workers of a
# cluster get the versions of their head, and the versions of a new head if it is replaced.
wanted=$("$python" - "$extras" "$group" <<'PY'
import hashlib, os, pathlib, sys
files = ["pyproject.toml", *os.environ.get("PIP_CONSTRAINT", "").split()]
made_of = b"".join(pathlib.Path(file).read_bytes() for file in files if pathlib.Path(file).is_file())
print(hashlib.sha256(made_of + " ".join(sys.argv[1:]).encode()).hexdigest())
PY
)
marker=".venv/qpruner-installed-$extras"
if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
  echo "== .venv has qpruner[$extras] already"
  exit 0
fi

free_mib=$(df -Pm . | awk 'NR == 2 { print $4 }')
# Further extras need little space.
compgen -G '.venv/qpruner-installed-*' >/dev/null || [ "$free_mib" -ge 8000 ] ||
  fail "the installation takes up to 8 GB, but only ${free_mib} MB are free in $PWD; make room"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  echo "== making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi
# Python compiles the modules that are used at their first import; pip would compile all, in half of its time.
pip=(env PYTHONWARNINGS=ignore PIP_QUIET=0 PIP_VERBOSE=0 .venv/bin/python -m pip --disable-pip-version-check)
by_pip() { "${pip[@]}" install --quiet --no-compile "$@"; }
# A cache in .venv is on the same disk, so files are linked and not copied; it leaves nothing behind.
by_uv() { UV_CACHE_DIR=.venv/uv .venv/bin/python -m uv pip install --python .venv/bin/python --quiet "$@"; }
echo "== installing qpruner[$extras] (torch, transformers, ray and others; a few minutes the first time)"
# Dependency groups need pip 25.1; this is also the first thing that needs the network.
by_pip --upgrade 'pip>=25.1' || fail "pip cannot reach a package index; check the network or proxy, then run this again"
install=by_pip
if by_pip uv && settings=$("${pip[@]}" config list | .venv/bin/python launch/uv_settings.py); then
  # In less than half of pip's time. Exported, because a command line with a password could be seen.
  eval "$settings"
  if by_uv --editable ".[$extras]"; then install=by_uv; else echo "== uv could not (its message is above), so pip installs"; fi
fi
[ $install = by_uv ] || by_pip --editable ".[$extras]" || fail "the installation failed; pip's own message is above"
if [ -n "$group" ]; then
  echo "== installing the group $group (without dependencies)"
  $install --no-deps --group "$group" || fail "the group $group could not be installed; the message is above"
fi
rm -rf .venv/uv
printf '%s' "$wanted" > "$marker"
echo "== done: .venv/bin/qpruner --help"
