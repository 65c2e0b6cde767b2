#!/usr/bin/env bash
# Takes a cluster down (`ray down`), and asks AWS whether any of its machines is left. Runs stay in the bucket or the
# shared folder: bring the cluster up again and submit again to resume them.
# Usage: bash launch/down.sh CLUSTER.yaml
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_commands.sh"
[ $# -eq 1 ] || usage
cluster=$(cluster_file "$1")
cd "$repository"
echo "== takes down $(sed -n 's/^cluster_name: *//p' "$cluster"): its head, all of its workers, and what runs there"
# On-premise, `ray down` stops only the head, and not if its start failed. Stop the head first, because its autoscaler
# would start the workers again.
if grep -Eq '^ *type: *local' "$cluster"; then
  run ray exec "$cluster" 'ray stop; python qpruner/launch/stop_workers.py' ||
    echo "warning: not every worker could be stopped from the head; run \`ray stop\` on the workers named above" >&2
fi
# Run this even if `ray down` fails, because remaining machines cost money.
code=0
run ray down --yes "$cluster" || code=$?
python launch/still_there.py "$cluster"
exit $code
