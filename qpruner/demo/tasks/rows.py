"""Reads the demo's questions for the lm-eval tasks beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"


def load(file: str, **_: Any) -> Any:
    """The rows of one file as lm-eval's `test` split; lm-eval passes the task's metadata along, which is not needed."""
    import datasets

    return {"test": datasets.Dataset.from_json(str(DATA / file))}
