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
fetched=() missing=()
for part in "$@"; do
  if run ray rsync-down "$cluster" "$from/$part" "$into/"; then fetched+=("$part"); else missing+=("$part"); fi
done
[ ${#fetched[@]} -eq 0 ] || echo "== fetched into $into: ${fetched[*]}"
[ ${#missing[@]} -eq 0 ] ||
  fail "not fetched: ${missing[*]}; what a run does not have yet comes with its stage: ray exec $cluster 'qpruner status $from'"
