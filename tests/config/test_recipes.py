"""The recipes of `tune_configs/` are complete, and the commands and figures of their headers are
right."""

import re
import runpy
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Raw, assert_has

from qpruner.config.load import load_config
from qpruner.pipeline import preflight

CONFIGS = sorted((ROOT / "tune_configs").rglob("*.yaml"))
RECIPES = runpy.run_path(str(ROOT / "docs" / "recipes.py"))
PAPER = ROOT / "tune_configs" / "paper"
FOR_GPUS = [path for path in CONFIGS if RECIPES["MEMORY"] in path.read_text()]
VARIANTS = ("uniform", "mutual_information", "bayesian")


def named(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_a_recipe_is_complete_and_says_how_to_run_it(path: Path) -> None:
    config = load_config(path)
    # No key is without effect.
    assert config.warnings == ()
    head = [line for line in path.read_text().split("output:")[0].splitlines() if line]
    assert all(line.startswith("#") for line in head)
    text = " ".join(head)
    assert all(
        word in text for word in ("Hardware:", "Time:", "Command:", str(path.relative_to(ROOT)))
    ), text
    # A time was never filled in.
    assert "TIME" not in text
    schema = re.search(r"\$schema=(\S+)", text)
    assert (path.parent / schema[1]).is_file()
    given = yaml.safe_load(path.read_text())
    # Every section is given, so that no default is hidden.
    shown = {
        "model",
        "data",
        "calibration",
        "prune",
        "quantize",
        "lora",
        "training",
        "search",
        "finetune",
        "evaluate",
    }
    assert shown <= set(given)
    for line in (line for line in head if line.startswith("# Command:")):
        assert str(path.relative_to(ROOT)) in line
        load_config(path, RECIPES["overrides_of"](line))


@pytest.mark.parametrize("path", FOR_GPUS, ids=named)
def test_a_header_states_the_memory_that_check_estimates(path: Path) -> None:
    """`python docs/recipes.py` updates these lines."""
    lines = path.read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line.startswith("# Command:")]
    for number in commands:
        peaks = RECIPES["peaks"](load_config(path, RECIPES["overrides_of"](lines[number])))
        told = dict(re.findall(r"(\w+) ([\d.]+) GB", lines[number + 1]))
        assert set(told) == {name.removeprefix("trial, ") for name in peaks}
        for name, size in peaks.items():
            assert float(told[name.removeprefix("trial, ")]) == pytest.approx(
                size / 1e9, rel=0.1, abs=0.06
            ), name
        card = re.search(r"fits a GPU with (\d+) GiB", lines[number + 1])
        assert max(peaks.values()) < 0.95 * int(card[1]) * 2**30


def test_the_large_recipes_fit_24_or_80_gib() -> None:
    """The comparison trains the dense base model, which fits 24 GiB only with checkpointing."""
    for path in (PAPER / "llama2_7b_bayesian.yaml", ROOT / "tune_configs" / "qwen3_8b.yaml"):
        assert re.findall(r"fits a GPU with (\d+) GiB", path.read_text()) == ["24", "80", "40"], (
            path
        )
        peaks = RECIPES["peaks"](
            load_config(path, ["finetune.compare=true", "training.gradient_checkpointing=true"])
        )
        assert "comparison" in peaks and max(peaks.values()) < 0.95 * 24 * 2**30, path


def inspected(path: Path, tiny_model: Path, folder: Path) -> preflight.Inspection:
    """Inspect a recipe offline: a hub model is replaced by its shape, its rows and tasks by those
    of the demo."""
    config = load_config(path)
    if config.model.source.startswith("package:"):
        return preflight.inspect(config, works_here=False)
    RECIPES["shapes"]()[config.model.source].save_pretrained(folder)
    for file in (*tiny_model.glob("tokenizer*"), tiny_model / "model.safetensors"):
        (folder / file.name).symlink_to(file)
    offline = load_config(PAPER / "smollm2_135m_bayesian.yaml")
    parts: Raw = {
        "model": config.model.model_copy(update={"source": str(folder)}),
        "data": offline.data.model_copy(update={"max_length": 256}),
        "calibration": config.calibration.model_copy(update={"data": None}),
        "evaluate": offline.evaluate,
    }
    return preflight.inspect(config.model_copy(update=parts), works_here=False)


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_no_recipe_gives_a_warning(path: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert inspected(path, tiny_model, tmp_path).warnings == ()


@pytest.mark.parametrize("model", ["llama2_7b", "smollm2_135m"])
def test_the_paper_variants_differ_only_in_bits(model: str) -> None:
    uniform, by_information, bayesian = (
        load_config(PAPER / f"{model}_{variant}.yaml") for variant in VARIANTS
    )
    assert len(uniform.quantize.levels) == 1
    assert uniform.measured_methods == ()
    assert by_information.search.plan_method == "mutual_information"
    assert [each.is_searched for each in (uniform, by_information, bayesian)] == [
        False,
        False,
        True,
    ]
    assert by_information.quantize == bayesian.quantize
    assert by_information.measured_methods == bayesian.measured_methods == ("mutual_information",)
    for section in (
        "model",
        "data",
        "calibration",
        "prune",
        "lora",
        "training",
        "finetune",
        "evaluate",
    ):
        assert (
            getattr(uniform, section)
            == getattr(by_information, section)
            == getattr(bayesian, section)
        ), section


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=named)
def test_the_paper_recipes_prune_like_llm_pruner(path: Path) -> None:
    config = load_config(path)
    prune = config.prune
    calibration = config.calibration
    units = (prune.importance, prune.order, prune.aggregation, prune.reduction)
    assert units == ("taylor", "first", "element", "sum")
    assert_has(prune, round_to=1, selection="per_layer", query_heads="modulo", compensation="none")
    assert_has(calibration, num_samples=10, max_length=64, batch_size=10)
    assert calibration.data
    assert all(source.format == "text" for source in calibration.data)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_7b_recipes_train_like_llm_pruner(variant: str) -> None:
    config = load_config(PAPER / f"llama2_7b_{variant}.yaml")
    assert_has(config.prune, layer_rate=0.25, first_layer=4, last_layer=29)
    assert (config.lora.rank, config.training.batch_size, config.training.learning_rate) == (
        8,
        64,
        1e-4,
    )
    assert config.finetune.epochs == 2
    assert not config.finetune.compare
    assert set(config.evaluate.tasks) == {
        "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    }  # fmt: skip
