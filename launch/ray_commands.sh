# shellcheck shell=bash
# Functions and paths of the cluster scripts, which source this file.
fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

usage() { sed -n 's/^# Usage: /usage: /p' "$0" >&2; exit 2; }

run() { printf '== %s\n' "$*"; "$@"; }

cluster_file() {
  [ -f "$1" ] || fail "there is no cluster file $1"
  realpath "$1"
}

# File mounts of a cluster file are relative to the repository.
repository=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
# Send no usage report. Autoscaler version 2 is Ray's default; set explicitly, `ray up` prints no notice about it.
export PATH="$repository/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_UP_enable_autoscaler_v2=1
command -v ray >/dev/null || fail "the command ray was not found; install it: bash launch/setup.sh cluster"
