"""Define the command line and its output."""

from typing import Any

Facts = dict[str, Any]
"""What a verb has to tell, as `--json` prints it."""
