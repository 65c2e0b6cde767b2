"""Runs `qpruner run CONFIG --address auto` on the head of a cluster.

Usage: ray submit cluster.yaml launch/search.py CONFIG [options of `qpruner run`]

Ray copies this file to the head. CONFIG is a path on the head, relative to ~/qpruner, the folder
that the cluster file installs. After `--percent-encoded`, all arguments are percent-encoded, as
submit.sh passes them.
"""

import os
import sys
from pathlib import Path
from urllib.parse import unquote

arguments = sys.argv[1:]
if arguments[:1] == ["--percent-encoded"]:
    arguments = [unquote(argument) for argument in arguments[1:]]
if not arguments:
    sys.exit("usage: search.py CONFIG [options of `qpruner run`]")
os.chdir(Path.home() / "qpruner")
command = ["qpruner", "run", arguments[0], "--address", "auto", *arguments[1:]]
print("==", *command, flush=True)
os.execvp(command[0], command)
