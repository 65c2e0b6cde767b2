"""Stops Ray on every worker of an on-premise cluster; launch/down.sh runs it on the head.

`ray down` does not end their raylets (Ray 2.60). The addresses and the key are in the file that
`ray up` wrote there.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from check_cluster import on_host


def main() -> None:
    """Stop all workers and print their answers; exit with code 1 if one could not be reached."""
    config = yaml.safe_load((Path.home() / "ray_bootstrap_config.yaml").read_text())
    workers = config["provider"]["worker_ips"]
    command = "source ~/qpruner/launch/node_env.sh; ray stop"

    def stop(host: str) -> subprocess.CompletedProcess[str]:
        return on_host(config["auth"], host, command, seconds=60)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(stop, workers))
    for host, result in zip(workers, results, strict=True):
        print(f"{host}: {(result.stdout or result.stderr).strip()}")
    if any(result.returncode for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
