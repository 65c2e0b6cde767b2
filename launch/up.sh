#!/usr/bin/env bash
# Brings a cluster up, or updates one that is up: checks the file, then `ray up`.
# Usage: bash launch/up.sh CLUSTER.yaml
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_commands.sh"
[ $# -eq 1 ] || usage
cluster=$(cluster_file "$1")
cd "$repository"
run python launch/check_cluster.py "$cluster"
run ray up --yes "$cluster"
echo "== up; workers join within minutes, see: bash launch/watch.sh $1"
