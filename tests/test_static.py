"""Mistyped commands, the version, the schema and the reference pages."""

import re
import runpy
from pathlib import Path

import pytest
import yaml
from conftest import command

from qpruner.config.load import config_schema
from qpruner.runs.version import VERSION
from qpruner.wording import counted

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("mistyped", "nearest"),
    [
        (("serach", "x.yaml"), "Did you mean 'search'?"),
        (("run", "x.yaml", "--adress", "auto"), "Did you mean '--address'?"),
    ],
)
def test_a_mistyped_word_gets_the_nearest_one(mistyped: tuple[str, ...], nearest: str) -> None:
    done = command(*mistyped)
    assert done.exit_code == 2
    assert nearest in done.output


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == VERSION


def test_schema_is_current() -> None:
    written = (ROOT / "tune_configs" / "schema.json").read_text()
    assert written == config_schema(), "run: qpruner schema > tune_configs/schema.json"


@pytest.mark.parametrize("page", ["configuration.md", "commands.md"])
def test_the_reference_is_current(page: str) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"))["pages"]()
    assert (ROOT / "docs" / page).read_text() == made[page], "run: python docs/reference.py"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1.0, "1 row"), (0.5, "0.5 rows")],
)
def test_only_one_is_singular(number: float, text: str) -> None:
    assert counted(number, "row") == text
