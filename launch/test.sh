#!/usr/bin/env bash
# The fast tests and every static check, from a fresh machine: makes .venv, installs, runs them.
# Usage: bash launch/test.sh [options of pytest]     Long tests: .venv/bin/pytest -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # the first process compiles modules, the others read them
# Minutes on one core of an otherwise idle machine, with packages installed.
CORE_MINUTES=16
cores=$(nproc)
processes=$((cores < 8 ? cores : 8))
echo "== about $(((CORE_MINUTES + processes - 1) / processes)) minutes on $cores cores, and the installation before it the first time"
bash launch/setup.sh dev demo-model
for check in "ruff check ." "ruff format --check ." "mypy" "lint-imports"; do
  echo "== $check"
  # shellcheck disable=SC2086
  .venv/bin/$check
done
echo "== pytest"
# One process per core, at most eight, with a gigabyte each. Tests of a file run in one process, because they share set-ups.
# Files run in their order: xdist would begin with those of most tests, and end with the longest.
exec .venv/bin/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
