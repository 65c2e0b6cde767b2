# What every shell and every Ray process on a cluster's machines has; the cluster files source it from ~/.bashrc.
# shellcheck shell=bash
export PATH="$HOME/qpruner/.venv/bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Keys, in `export NAME=value` lines: git does not track it.
if [ -f "$HOME/qpruner/launch/node_secrets.sh" ]; then
  # shellcheck source=/dev/null
  source "$HOME/qpruner/launch/node_secrets.sh"
fi
