"""Format numbers, hints and the command of this process for messages."""

import difflib
import math
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def counted(number: float, noun: str) -> str:
    """Format a count with its noun, as ``1 trial`` or ``2 trials``; the plural adds an s."""
    text = f"{number:g}" if isinstance(number, float) else f"{number}"
    return f"{text} {noun}{'' if number == 1 else 's'}"


def nearest(word: str, known: Iterable[str], heading: str) -> str:
    """Suggest the known word that is most like a misspelt one.

    If none is like it, all known words are listed.
    """
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean `{near[0]}`?" if near else f"{heading} {', '.join(words)}"


def error_text(stderr: float | None, digits: int) -> str:
    """Format a standard error to follow its mean, as `` (se 0.048)``.

    The text is empty if there is no standard error.
    """
    return "" if stderr is None or math.isnan(stderr) else f" (se {stderr:.{digits}f})"


def without_nan(value: Any) -> Any:
    """Replace NaN and infinities by None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_called() -> str:
    """Return the command line of this process for a shell.

    A program that is not on PATH is named with its path.
    """
    called, *arguments = sys.argv
    name = Path(called).name
    program = (
        ["python", "-m", "qpruner"]
        if name == "__main__.py"
        else [name if shutil.which(name) else called]
    )
    return shlex.join([*program, *arguments])


def duration(seconds: float) -> str:
    """Format seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
