"""Keys that have no effect beside others: named in a warning, and otherwise as if they were not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import raw_config, with_key

import qpruner
from qpruner.config.load import load_config, validate_config
from qpruner.config.schema import PruneConfig, RunConfig
from qpruner.errors import ConfigError

DEMO = Path(__file__).parents[2] / "tune_configs" / "demo_smollm2_cpu.yaml"
WITHOUT_COMPARE = "`finetune.seed_rows` has no effect: `finetune.compare` is false"


def config_of(changes: dict[str, Any]) -> RunConfig:
    raw = raw_config(Path("model"), Path("run"))
    for key, value in changes.items():
        raw = with_key(raw, key, value)
    return validate_config(raw)


@pytest.mark.parametrize(
    ("changes", "idle", "reason"),
    [
        ({"prune.order": "second"}, "prune.order", "`prune.importance` is fisher"),
        ({"prune.importance": "magnitude", "prune.aggregation": "vector"}, "prune.aggregation", "is magnitude"),
        ({"prune.norm": "l1"}, "prune.norm", "`prune.importance` is fisher"),
        ({"prune.importance": "random", "prune.reduction": "max"}, "prune.reduction", "`prune.importance` is random"),
        ({"prune.importance": "fluctuation", "prune.query_heads": "modulo"}, "prune.query_heads", "is fluctuation"),
        ({"prune.ridge": 0.1, "prune.compensation": "bias"}, "prune.ridge", "`prune.compensation` is bias"),
        ({"prune.depth_share": 0.4, "prune.units": ["mlp"]}, "prune.depth_share", "no whole blocks go (`prune.units`)"),
        ({"prune.depth_share": 0.4, "prune.units": ["block"]}, "prune.depth_share", "names whole blocks only"),
        ({"prune": {"layer_rate": 0.2, "depth_importance": "taylor"}}, "prune.depth_importance", "no whole blocks go"),
        ({"prune.units": ["block"], "prune.compensation": "bias"}, "prune.compensation", "names whole blocks only"),
        ({"prune.units": ["block"], "prune.steps": 2}, "prune.steps", "`prune.units` names whole blocks only"),
        ({"prune.units": ["block"], "prune.selection": "per_layer"}, "prune.selection", "names whole blocks only"),
        ({"prune.units": ["block"], "prune.round_to": 32}, "prune.round_to", "names whole blocks only"),
        ({"prune.units": ["block"], "prune.importance": "magnitude"}, "prune.importance", "names whole blocks only"),
        ({"calibration.token_ids": "ids.json"}, "calibration.num_samples", "`calibration.token_ids` is given"),
        (
            {"quantize.bits": [8, 16], "quantize.double_quant": True},
            "quantize.double_quant",
            "`quantize.bits` has no 4",
        ),
        (
            {"calibration": {"token_ids": "ids.json", "data": [{"source": "rows.jsonl"}]}},
            "calibration.data",
            "`calibration.token_ids` is given",
        ),
        ({"prune": {"rate": 0, "importance": "taylor"}}, "prune.importance", "`prune.rate` is 0"),
        ({"prune": {"rate": 0, "order": "second"}}, "prune.order", "`prune.rate` is 0"),
        ({"prune": {"rate": 0, "uniform": True}}, "prune.uniform", "`prune.rate` is 0"),
        ({"prune": {"rate": 0, "first_layer": 1}}, "prune.first_layer", "`prune.rate` is 0"),
        ({"sensitivity": {"methods": [], "batch_size": 2}}, "sensitivity.batch_size", "`sensitivity.methods` is empty"),
        *(
            ({"quantize.bits": [4], "sensitivity": {}, "search": search}, f"search.{key}", "`quantize.bits` is [4]")
            for key, search in (
                ("searcher", {"searcher": "random"}),
                ("max_trials", {"max_trials": 5}),
                ("max_hours", {"max_hours": 1}),
                ("max_gpu_hours", {"max_gpu_hours": 1}),
                ("patience", {"patience": 2}),
                ("pareto", {"pareto": True}),
                ("confirm", {"confirm": 2}),
            )
        ),
        *(
            ({"quantize.bits": [8], "sensitivity": {key: value}, "search": {}}, f"sensitivity.{key}", "`quantize.bits`")
            for key, value in (("methods", ["kl"]), ("batch_size", 2), ("num_shuffles", 2))
        ),
        ({"lora.init": "plain", "lora.loftq_iterations": 2}, "lora.loftq_iterations", "`lora.init` is plain"),
        (
            {"sensitivity": {"methods": ["fisher"], "num_shuffles": 2}},
            "sensitivity.num_shuffles",
            "`sensitivity.methods` lacks mutual_information",
        ),
        (
            {"sensitivity": {"methods": ["fisher"], "num_measured_samples": 2}},
            "sensitivity.num_measured_samples",
            "`sensitivity.methods` lacks kl and loss",
        ),
        ({"search.patience": 3, "search.searcher": "random"}, "search.patience", "`search.searcher` is random"),
        ({"search.patience": 3, "search.pareto": True}, "search.patience", "`search.pareto` is true"),
        ({"search.limit": 8}, "search.limit", "`search.tasks` names none"),
        ({"finetune": {"steps": 4, "seeds": 2}}, "finetune.seeds", "`finetune.compare` is false"),
        ({"finetune": {"steps": 4, "random_plans": 1}}, "finetune.random_plans", "`finetune.compare` is false"),
        ({"finetune": {"steps": 4, "seed_rows": "all"}}, "finetune.seed_rows", "`finetune.compare` is false"),
    ],
    ids=str,
)
def test_a_key_without_effect_is_named_with_the_reason(changes: dict[str, Any], idle: str, reason: str) -> None:
    [warning] = config_of(changes).warnings
    assert warning.startswith(f"`{idle}` has no effect: ") and reason in warning


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prune.units": ["block", "mlp"], "prune.depth_importance": "taylor", "prune.order": "first"},
        {"prune": {"layer_rate": 0.2, "importance": "random"}},
        {"prune": {"layer_rate": 0.2, "importance": "taylor", "order": "mixed", "query_heads": "served"}},
        {"prune.uniform": True, "prune.ridge": 0.1},
        {"prune.units": ["block"], "prune.uniform": True, "prune.ridge": 0.1},
        {"search.patience": 3, "finetune.seeds": 2},
        {"search.plan": "plan.yaml", "search.patience": 3, "search.confirm": 4},
        {"prune": {"rate": 0}},
        {"quantize.bits": [4], "sensitivity": {}, "search": {"steps": 4, "first_rung": 1, "max_concurrent": 2}},
    ],
    ids=str,
)
def test_keys_with_an_effect_are_not_named(changes: dict[str, Any]) -> None:
    """Where `units` is open a second cut takes whole blocks, too; what `layer_rate` implies is nobody's key; a
    file that a plan is taken for may be that of a search."""
    assert config_of(changes).warnings == ()


def test_each_key_is_named_once_and_a_key_at_its_default_never() -> None:
    config = config_of({"prune": {"units": ["block"], "importance": "magnitude", "order": "second", "norm": "l2"}})
    named = [warning.split("`")[1] for warning in config.warnings]
    assert named == ["prune.importance", "prune.order"]
    whole = validate_config(config_of({"finetune": {"steps": 4}}).model_dump(mode="json"))
    assert whole.warnings == (), "a file with every key, as `check --show-config` prints it"


def test_the_demo_without_comparison_takes_one_set() -> None:
    config = load_config(DEMO, ["finetune.compare=false"])
    assert config.warnings == ("`finetune.random_plans` has no effect: `finetune.compare` is false",)
    assert load_config(DEMO).warnings == ()
    assert load_config(DEMO, ["search.plan=plan.yaml"]).warnings == (), "as `--plan` sets it"


def test_in_effect_are_defaults_where_a_key_has_none() -> None:
    """So that nothing is computed anew for the sake of such a key."""
    idle = PruneConfig(importance="magnitude", order="second", aggregation="vector", norm="l1")
    assert idle.in_effect() == PruneConfig(importance="magnitude", norm="l1")


def named_in(text: str) -> int:
    return text.count(WITHOUT_COMPARE)


@pytest.fixture
def config_file(tiny_raw: dict[str, Any], write_yaml: Callable[[dict[str, Any]], Path]) -> Path:
    return write_yaml(with_key(tiny_raw, "finetune", {"steps": 4, "seed_rows": "all"}))


def test_verbs_name_the_key_once_and_so_does_the_log(config_file: Path, tmp_path: Path) -> None:
    for verb in (("check",), ("prepare", "--quiet"), ("prune", "--dry-run")):
        command = [sys.executable, "-m", "qpruner", *verb, str(config_file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert named_in(done.stdout + done.stderr) == 1, (verb, done.stdout, done.stderr)
    assert named_in((tmp_path / "run" / "qpruner.log").read_text()) == 1, "of the one command that keeps a log"


def test_functions_name_the_key(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qpruner.run(config_file, until="prepare")
    told = capsys.readouterr()
    assert named_in(told.out + told.err) == 1


def test_what_cannot_work_is_still_refused() -> None:
    for changes in ({"prune.layer_rate": 0.2}, {"finetune.epochs": 2}, {"search.first_rung": 99}):
        with pytest.raises(ConfigError):
            config_of(changes)
