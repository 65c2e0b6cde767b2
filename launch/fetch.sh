#!/usr/bin/env bash
# Copies a run's results to this machine: the reports, their data, the records and the final model. From a folder on the
# cluster by `ray rsync-down`, from a bucket by `aws s3 sync`.
# Usage: bash launch/fetch.sh CLUSTER.yaml RUN-FOLDER-OR-URI INTO-FOLDER [FILE-OR-FOLDER-OF-THE-RUN ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_commands.sh"
[ $# -ge 3 ] || usage
cluster=$(cluster_file "$1")
from=$2 into=$3
shift 3
[ $# -gt 0 ] || set -- report.html report.md results.json records final
if [[ $from == gs://* ]]; then
  fail "$from is in Google's storage: gcloud storage rsync -r $from $into   (or one part of it: $from/final $into/final)"
fi
mkdir -p "$into"
if [[ $from == s3://* ]]; then
  parts=()
  for part in "$@"; do parts+=(--include "$part" --include "$part/*"); done
  run aws s3 sync "$from" "$into" --exclude '*' "${parts[@]}"
  echo "== $into has what there is of $*; what a run does not have yet comes with its stage: qpruner status $from"
  exit
fi
fetched=() missing=()
for part in "$@"; do
  if run ray rsync-down "$cluster" "$from/$part" "$into/"; then fetched+=("$part"); else missing+=("$part"); fi
done
[ ${#fetched[@]} -eq 0 ] || echo "== fetched into $into: ${fetched[*]}"
[ ${#missing[@]} -eq 0 ] ||
  fail "not fetched: ${missing[*]}; what a run does not have yet comes with its stage: ray exec $cluster 'qpruner status $from'"
