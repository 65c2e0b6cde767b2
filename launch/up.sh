#!/usr/bin/env bash
# Brings a cluster up, or updates one that is up: names it if it has no name, checks the file, then `ray up`.
# Usage: bash launch/up.sh CLUSTER.yaml
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_commands.sh"
[ $# -eq 1 ] || usage
cluster=$(cluster_file "$1")
cd "$repository"
if grep -q '^cluster_name: NAME-REPLACE' "$cluster"; then
  # The folder of a colleague, who may also be `ubuntu`, and another file of this folder need another name.
  name=$(printf 'qpruner-%s-%s' "$(id -un)" "$(basename "$repository")" | tr -c 'A-Za-z0-9-' - | cut -c -50)
  name=$name-$(od -An -N3 -tx1 /dev/urandom | tr -d ' \n')
  sed -i "s/^cluster_name: NAME-REPLACE/cluster_name: $name/" "$cluster"
  echo "== named the cluster $name, in $cluster"
fi
run python launch/check_cluster.py "$cluster"
run ray up --yes "$cluster"
echo "== up; workers join within minutes, see: bash launch/watch.sh $1"
