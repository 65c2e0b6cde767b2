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

from qpruner.cli import main
from qpruner.config import config_schema, load_config
from qpruner.version import VERSION

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "tune_configs").glob("*.yaml"))


def test_help_and_version_import_no_heavy_library() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom qpruner.cli import main\n"
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_complete_and_says_how_to_run_it(path: Path) -> None:
    config = load_config(path)
    head = path.read_text().splitlines()[:3]
    assert all(line.startswith("#") for line in head)
    text = " ".join(head)
    assert all(word in text for word in ("Hardware:", "Time:", "Command:", path.name)), text
    given = yaml.safe_load(path.read_text())
    # Complete: a section that is left out would take values that the file does not show.
    shown = {"model", "data", "calibration", "prune", "quantize", "lora", "training", "search", "finetune", "evaluate"}
    assert shown <= set(given)
    assert config.output == given["output"]


def test_the_seven_billion_recipes_follow_the_paper() -> None:
    for name in ("llama2_7b_p20", "llama2_7b_p50", "vicuna_7b_p30"):
        config = load_config(ROOT / "tune_configs" / f"{name}.yaml")
        assert (config.prune.first_layer, config.prune.last_layer) == (4, 29)
        assert (config.calibration.num_samples, config.calibration.max_length) == (10, 64)
        assert (config.lora.rank, config.training.batch_size, config.training.learning_rate) == (8, 64, 1e-4)
        assert config.finetune.epochs == 2
        assert set(config.evaluate.tasks) == {
            "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
        }  # fmt: skip
