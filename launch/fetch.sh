#!/usr/bin/env bash
# Copies a run's results to this machine (`ray rsync-down`): the reports, their data, the records and the final model.
# Usage: bash launch/fetch.sh CLUSTER.yaml RUN-FOLDER-ON-THE-CLUSTER INTO-FOLDER [FILE-OR-FOLDER-OF-THE-RUN ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_commands.sh"
[ $# -ge 3 ] || usage
cluster=$(cluster_file "$1")
from=$2 into=$3
shift 3
[ $# -gt 0 ] || set -- report.html report.md results.json records final
mkdir -p "$into"
for part in "$@"; do
  run ray rsync-down "$cluster" "$from/$part" "$into/"
done
echo "== fetched into $into: $*"
