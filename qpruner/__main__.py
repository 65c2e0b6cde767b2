"""Run the command `qpruner` as `python -m qpruner`."""

from qpruner.cli.main import main

main()
