"""Runs `qpruner run CONFIG --address auto` on the head of a cluster, in the folder that the cluster file installs.

Usage: ray submit cluster.yaml launch/search.py CONFIG [options of `qpruner run`]     (Ray copies this file to the head)
CONFIG is a path on the head, relative to ~/qpruner.
"""

import os
import sys
from pathlib import Path

if len(sys.argv) < 2:
    sys.exit("usage: search.py CONFIG [options of `qpruner run`]")
os.chdir(Path.home() / "qpruner")
command = ["qpruner", "run", sys.argv[1], "--address", "auto", *sys.argv[2:]]
print("==", *command, flush=True)
os.execvp(command[0], command)
