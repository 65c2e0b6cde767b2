"""Mistyped commands, the version, the schema and the reference pages."""

import re
import runpy

import pytest
import yaml
from conftest import ROOT, command

from qpruner.config.load import config_schema
from qpruner.runs.version import VERSION
from qpruner.wording import counted


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
    assert newest[1] == VERSION


def test_schema_is_current() -> None:
    written = (ROOT / "tune_configs" / "schema.json").read_text()
    # `qpruner schema > tune_configs/schema.json` writes it again.
    assert written == config_schema()


@pytest.mark.parametrize("page", ["configuration.md", "commands.md"])
def test_the_reference_is_current(page: str) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"))["pages"]()
    # `python docs/reference.py` writes them again.
    assert (ROOT / "docs" / page).read_text() == made[page]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1.0, "1 row"), (0.5, "0.5 rows")],
)
def test_only_one_is_singular(number: float, text: str) -> None:
    assert counted(number, "row") == text
