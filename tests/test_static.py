"""What a person notices before anything runs: the help answers at once, the schema is current, the configs load."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qpruner.cli.main import main
from qpruner.config.load import config_schema
from qpruner.runs.version import VERSION

ROOT = Path(__file__).resolve().parent.parent


def test_help_and_version_import_no_heavy_library() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom qpruner.cli.main import main\n"
        "for asked in (['--help'], ['--version'], ['run', '--help']):\n"
        "    assert CliRunner().invoke(main, asked).exit_code == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'peft', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("mistyped", "nearest"),
    [
        (("serach", "x.yaml"), "did you mean `qpruner search`?"),
        (("run", "x.yaml", "--adress", "auto"), "Did you mean '--address'?"),
        (("trials", "runs/x", "--descendign"), "Did you mean '--descending'?"),
    ],
)
def test_what_is_mistyped_names_the_nearest(mistyped: tuple[str, ...], nearest: str) -> None:
    done = CliRunner().invoke(main, mistyped)
    assert done.exit_code == 2
    assert nearest in done.output


def test_the_version_is_the_same_wherever_it_is_told() -> None:
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
