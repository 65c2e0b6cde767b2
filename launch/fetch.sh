#!/usr/bin/env bash
# Copies a run's results to this machine: the reports with their pictures and data, the records and the final model. From a
# folder on the cluster by `ray rsync-down`, from a bucket by `aws s3 sync`.
# Usage: bash launch/fetch.sh CLUSTER.yaml RUN-FOLDER-OR-URI INTO-FOLDER [FILE-OR-FOLDER-OF-THE-RUN ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_commands.sh"
[ $# -ge 3 ] || usage
cluster=$(cluster_file "$1")
named=$1 from=$2 into=$3
shift 3
[ $# -gt 0 ] || set -- report.html report.md pictures results.json records final
if [[ $from == gs://* ]]; then
  fail "$from is in Google's storage: gcloud storage rsync -r $from $into   (or one part of it: $from/final $into/final)"
fi
if [[ $from == s3://*\?* ]]; then
  endpoint=$(sed -n 's/.*[?&]endpoint_override=\([^&]*\).*/\1/p' <<<"$from")
  fail "aws s3 knows no ? in a URI; the endpoint is a variable: AWS_ENDPOINT_URL=${endpoint:-https://...} bash $0 $named ${from%%\?*} $into"
fi
mkdir -p "$into"
fetched=() missing=()
if [[ $from == s3://* ]]; then
  from=${from%/} parts=()
  for part in "$@"; do parts+=(--include "$part" --include "$part/*"); done
  run aws s3 sync "$from" "$into" --exclude '*' "${parts[@]}"
  # `aws s3 sync` also succeeds if a part does not exist.
  for part in "$@"; do
    if aws s3 ls "$from/$part" | grep -E " ${part##*/}/?\$" >/dev/null; then fetched+=("$part"); else missing+=("$part"); fi
  done
  status="qpruner status $from"
else
  for part in "$@"; do
    if run ray rsync-down "$cluster" "$from/$part" "$into/"; then fetched+=("$part"); else missing+=("$part"); fi
  done
  status="ray exec $named 'qpruner status $from'"
fi
[ ${#fetched[@]} -eq 0 ] || echo "== fetched into $into: ${fetched[*]}"
[ ${#missing[@]} -eq 0 ] ||
  fail "not fetched: ${missing[*]}; is $from the run's folder? What a run does not have yet comes with its stage: $status"
