"""`python -m qpruner` is the command `qpruner`, of that very Python."""

from qpruner.cli.main import main

main()
