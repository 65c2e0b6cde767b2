#!/usr/bin/env bash
# Shows a cluster's machines and jobs (`ray status`, `ray list`), or follows one job (`ray job logs --follow`).
# Usage: bash launch/watch.sh CLUSTER.yaml [JOB]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_commands.sh"
[ $# -eq 1 ] || [ $# -eq 2 ] || usage
cluster=$(cluster_file "$1")
if [ $# -eq 2 ]; then
  run ray exec "$cluster" "ray job logs --follow $(printf '%q' "$2")"
else
  # If the head is gone, `ray status` would wait forever.
  run ray exec "$cluster" "timeout 60 ray status && timeout 60 ray list nodes && timeout 60 ray list jobs"
fi
