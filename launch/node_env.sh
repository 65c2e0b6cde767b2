# What every shell and every Ray process on a cluster's machines has; the cluster files source it from ~/.bashrc.
# shellcheck shell=bash
export PATH="$HOME/qpruner/.venv/bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
