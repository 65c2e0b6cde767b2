# The environment of every shell and Ray process on the machines of a cluster; ~/.bashrc sources it there.
# shellcheck shell=bash
export PATH="$HOME/qpruner/.venv/bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# A file for keys, in lines `export NAME=value`; git ignores it.
if [ -f "$HOME/qpruner/launch/node_secrets.sh" ]; then
  # shellcheck source=/dev/null
  source "$HOME/qpruner/launch/node_secrets.sh"
fi
