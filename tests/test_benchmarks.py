"""The benchmarks run, and what they promise about memory holds; long, so not in the fast tier."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def last_line(*arguments: str) -> dict[str, object]:
    """The JSON line that a benchmark ends with."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=7200, check=True
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_seven_billion_parameters_are_pruned_within_22_gib() -> None:
    """LLM-Pruner needs about 80 GB for this; 20 GiB of free memory are needed here."""
    found = last_line("benchmarks/prune_7b.py", "--save")
    assert found["below_22_gib"] is True
    before, after = found["parameters_before"], found["parameters_after"]
    assert isinstance(before, int) and isinstance(after, int)
    assert abs(1 - after / before - 0.2) < 0.001
