"""Reads the demo's questions for the lm-eval tasks beside this file."""

from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"


def load(file: str, **_: Any) -> Any:
    """Return the rows of one file as lm-eval's `test` split."""
    import datasets

    return {"test": datasets.Dataset.from_json(str(DATA / file))}
