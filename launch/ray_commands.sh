# shellcheck shell=bash
# Sourced by the cluster scripts: where they find Ray, how they say what they run, and how they fail.
fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

usage() { sed -n 's/^# Usage: /usage: /p' "$0" >&2; exit 2; }

run() { printf '== %s\n' "$*"; "$@"; }

cluster_file() {
  [ -f "$1" ] || fail "there is no cluster file $1"
  realpath "$1"
}

# File mounts of a cluster file are relative to the repository.
repository=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
# No usage report leaves the machine. Version 2 is Ray's default; said aloud, `ray up` does not announce it.
export PATH="$repository/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_UP_enable_autoscaler_v2=1
command -v ray >/dev/null || fail "the command ray was not found; install it: bash launch/setup.sh cluster"
