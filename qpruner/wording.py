"""Render numbers and this command for people and other programs."""

from __future__ import annotations

import difflib
import math
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def counted(number: float, noun: str) -> str:
    """Render a number of things: ``1 trial``, ``2 trials``; the plural takes an s."""
    text = f"{number:g}" if isinstance(number, float) else f"{number}"
    return f"{text} {noun}{'' if number == 1 else 's'}"


def nearest(word: str, known: Iterable[str], heading: str, cutoff: float = 0.6) -> str:
    """Return a hint at the known word that was meant; where none is near, the heading and all of them."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=cutoff)
    return f"did you mean `{near[0]}`?" if near else f"{heading} {', '.join(words)}"


def error_text(stderr: float | None, digits: int) -> str:
    """Render a standard error behind its mean, `` (se 0.048)``; nothing where there is none."""
    return "" if stderr is None or math.isnan(stderr) else f" (se {stderr:.{digits}f})"


def without_nan(value: Any) -> Any:
    """Replace NaN and infinities by None, for JSON: the standard error of a single question, say, is null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_called() -> str:
    """Return the command of this process for a shell.

    `launch/demo.sh` calls the program by its path, since `.venv` need not be active.
    """
    called, *arguments = sys.argv
    name = Path(called).name
    program = ["python", "-m", "qpruner"] if name == "__main__.py" else [name if shutil.which(name) else called]
    return shlex.join([*program, *arguments])


def duration(seconds: float) -> str:
    """Format seconds: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
