#!/usr/bin/env bash
# Copies a configuration to the head and runs it there, as a job that continues after you log out (`ray job submit`), or
# attached to this terminal (`ray submit`). Repeated, it resumes from its records.
# Usage: bash launch/submit.sh [--attached] CLUSTER.yaml CONFIG.yaml [options of `qpruner run`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_commands.sh"
attached=""
if [ "${1:-}" = --attached ]; then
  attached=yes
  shift
fi
[ $# -ge 2 ] || usage
cluster=$(cluster_file "$1")
named=$1 given=$2
shift 2
[ -f "$given" ] || fail "there is no configuration $given"
name=$(basename "$given")
# Up to three shells read the arguments, and Ray joins them without quoting `&` or `$` (2.60): percent-encoded, they have
# no character that any of them would change. search.py decodes them. `quote` leaves `~`, which bash expands after `=`.
encode='import sys, urllib.parse as u
print(*(u.quote(each, safe="/=,:@+").replace("~", "%7E") for each in sys.argv[1:]))'
encoded=$(python -c "$encode" "tune_configs/$name" "$@")
run ray rsync-up "$cluster" "$given" "qpruner/tune_configs/$name"
if [ -n "$attached" ]; then
  # shellcheck disable=SC2086  # encoded arguments have no spaces
  run ray submit "$cluster" "$repository/launch/search.py" -- --percent-encoded $encoded
else
  job=$(printf %s "${name%.*}" | tr -c "A-Za-z0-9._-" -)-$(date -u +%Y%m%d-%H%M%S)
  # Over ssh, so that the job server only has to listen on the head's loopback.
  run ray exec "$cluster" \
    "ray job submit --no-wait --submission-id $job -- python \$HOME/qpruner/launch/search.py --percent-encoded $encoded"
  echo "== follow: bash launch/watch.sh $named $job"
  echo "== stop:   ray exec $named 'ray job stop $job'"
fi
