#!/usr/bin/env bash
# Takes a cluster down (`ray down`), and asks AWS whether a machine of it is left. Runs stay in the bucket or the shared
# folder: bring it up again, submit again, and they go on.
# Usage: bash launch/down.sh CLUSTER.yaml
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_commands.sh"
[ $# -eq 1 ] || usage
cluster=$(cluster_file "$1")
cd "$repository"
# `ray down` stops the head of an on-premise cluster only, and not one whose start failed. The head goes first: its
# autoscaler would start the workers again.
if grep -Eq '^ *type: *local' "$cluster"; then
  run ray exec "$cluster" 'ray stop; python qpruner/launch/stop_workers.py' ||
    echo "warning: not every worker could be stopped from the head; run \`ray stop\` on those that are named above" >&2
fi
# Also where that fails: what is left goes on costing.
code=0
run ray down --yes "$cluster" || code=$?
python launch/still_there.py "$cluster"
exit $code
