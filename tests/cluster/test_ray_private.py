"""Ray's private names stand in one file, and they exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qpruner
from qpruner.cluster import ray_private

PACKAGE = Path(qpruner.__file__).parent
PRIVATE = re.compile(r"\bray(\.\w+)*\._(?!_)|from ray[\w.]* import [^\n]*\b_\w|import_module\(.ray")


def test_private_names_stand_in_one_file() -> None:
    found = {path.name for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text(encoding="utf-8"))}
    assert found == {"ray_private.py"}


@pytest.mark.parametrize("name", ray_private.NAMES)
def test_private_names_exist(name: str) -> None:
    import qpruner.cluster.group  # noqa: F401, chooses Ray Train's second API

    assert getattr(ray_private, name) is not None
