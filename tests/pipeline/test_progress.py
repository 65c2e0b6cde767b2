"""`run.json` tells what the latest command that began something did; one that is refused leaves it alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import raw_config, with_key

from qpruner.config import validate_config
from qpruner.errors import UserError
from qpruner.events import Event
from qpruner.pipeline import run


def ignore(event: Event) -> None:
    """Nobody watches."""


def test_a_refused_command_leaves_what_the_last_one_told(tiny_model: Path, tmp_path: Path) -> None:
    """`qpruner status` and a new report would else call the run that stands there failed."""
    raw, told = raw_config(tiny_model, tmp_path / "run"), tmp_path / "run" / "run.json"
    run(validate_config(raw), ignore, until="prepare")
    before = told.read_bytes()
    refused = with_key(raw, "search.resources_per_trial", {"gpu": 999})
    with pytest.raises(UserError, match="ask for less"):
        run(validate_config(refused), ignore, until="search")
    assert told.read_bytes() == before
    assert not (tmp_path / "run" / "report.md").exists()


def test_a_command_that_finds_everything_recorded_says_that_it_is_done(tiny_model: Path, tmp_path: Path) -> None:
    raw, told = raw_config(tiny_model, tmp_path / "run"), tmp_path / "run" / "run.json"
    for expected in ("done", "recorded"):
        run(validate_config(raw), ignore, until="prepare")
        state = json.loads(told.read_text())
        assert (state["outcome"], state["stages"]["prepare"]["state"]) == ("done", expected)
