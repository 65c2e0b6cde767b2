"""Keys without effect are named in a warning and do not change anything else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Raw, changed_by, command, raw_config, with_key

import qpruner
from qpruner.config.load import load_config, validate_config
from qpruner.config.schema import PruneConfig, RunConfig
from qpruner.plans.plan import cut_title

DEMO = Path(__file__).parents[2] / "tune_configs" / "demo_smollm2_cpu.yaml"
WITHOUT_COMPARE = "`finetune.random_plans` has no effect: `finetune.compare` is false"
BLOCKS = "prune.units=[block]; "
ONE_LEVEL = "quantize.bits=[4]; sensitivity={}; "
IDLE = [
    ("prune.order=second", "prune.order", "`prune.importance` is fisher"),
    ("prune.importance=magnitude; prune.aggregation=vector", "prune.aggregation", "is magnitude"),
    ("prune.norm=l1", "prune.norm", "`prune.importance` is fisher"),
    (
        "prune.importance=random; prune.reduction=max",
        "prune.reduction",
        "`prune.importance` is random",
    ),
    (
        "prune.importance=fluctuation; prune.query_heads=modulo",
        "prune.query_heads",
        "is fluctuation",
    ),
    ("prune.ridge=0.1; prune.compensation=none", "prune.ridge", "`prune.compensation` is none"),
    (
        "prune.depth_share=0.4; prune.units=[mlp]",
        "prune.depth_share",
        "`prune.units` does not name block",
    ),
    (
        BLOCKS + "prune.depth_share=0.4",
        "prune.depth_share",
        "`prune.units` names whole blocks only",
    ),
    (BLOCKS + "prune.steps=2", "prune.steps", "`prune.units` names whole blocks only"),
    (
        BLOCKS + "prune.selection=per_layer",
        "prune.selection",
        "`prune.units` names whole blocks only",
    ),
    (BLOCKS + "prune.round_to=32", "prune.round_to", "`prune.units` names whole blocks only"),
    ("prune={rate: 0, importance: taylor}", "prune.importance", "`prune.rate` is 0"),
    ("prune={rate: 0, uniform: true}", "prune.uniform", "`prune.rate` is 0"),
    (
        "quantize.bits=[8, 16]; quantize.double_quant=true",
        "quantize.double_quant",
        "nf4 is not among the formats",
    ),
    (
        "sensitivity={methods: [], batch_size: 2}",
        "sensitivity.batch_size",
        "`sensitivity.methods` is empty",
    ),
    (
        "sensitivity={methods: [fisher], num_shuffles: 2}",
        "sensitivity.num_shuffles",
        "lacks mutual_information",
    ),
    (
        "sensitivity={methods: [fisher], num_measured_samples: 2}",
        "sensitivity.num_measured_samples",
        "`sensitivity.methods` lacks kl and loss",
    ),
    (ONE_LEVEL + "search={max_trials: 5}", "search.max_trials", "nf4 is the only format"),
    (
        ONE_LEVEL + "search={}; sensitivity.methods=[kl]",
        "sensitivity.methods",
        "nf4 is the only format",
    ),
    ("lora.init=plain; lora.loftq_iterations=2", "lora.loftq_iterations", "`lora.init` is plain"),
    ("search.limit=8", "search.limit", "`search.tasks` is empty"),
    ("finetune={steps: 4, seeds: 2}", "finetune.seeds", "`finetune.compare` is false"),
]
EFFECTIVE = [
    "prune={layer_rate: 0.2, importance: random}",
    "prune={layer_rate: 0.2, importance: taylor, order: mixed, query_heads: served}",
    "prune.uniform=true; prune.ridge=0.1",
    BLOCKS + "prune.uniform=true; prune.ridge=0.1",
    "finetune.seeds=2",
    "search.plan=plan.yaml; search.confirm=4",  # the file may have been written for a search
    "prune={rate: 0}",
    ONE_LEVEL + "search={steps: 4, first_rung: 1, max_concurrent: 2}",
]


def config_of(change: str) -> RunConfig:
    return validate_config(changed_by(change, raw_config(Path("model"), Path("run"))))


@pytest.mark.parametrize(("change", "idle", "reason"), IDLE, ids=[change for change, _, _ in IDLE])
def test_a_key_without_effect_is_named_with_the_reason(change: str, idle: str, reason: str) -> None:
    [warning] = config_of(change).warnings
    assert warning.startswith(f"`{idle}` has no effect: ")
    assert reason in warning


@pytest.mark.parametrize("change", EFFECTIVE)
def test_keys_with_an_effect_are_not_named(change: str) -> None:
    assert config_of(change).warnings == ()


def test_a_key_is_named_once_and_never_at_its_default() -> None:
    config = config_of(
        "prune={rate: 0.2, units: [block], importance: magnitude, order: second, norm: l2}"
    )
    assert [warning.split("`")[1] for warning in config.warnings] == [
        "prune.importance",
        "prune.order",
    ]
    whole = validate_config(config_of("finetune={steps: 4}").model_dump(mode="json"))
    # Such a file has every key, as `check --show-config` prints it.
    assert whole.warnings == ()
    *_, warning = warnings = load_config(DEMO, ["finetune.compare=false"]).warnings
    assert len(warnings) == 2
    assert warning == "`finetune.random_plans` has no effect: `finetune.compare` is false"


def test_every_cut_has_a_name_and_a_title() -> None:
    cuts = PruneConfig(rates=(0.0, 0.07, 0.125, 0.3)).cuts
    assert list(cuts) == ["base", "cut-7", "cut-12.5", "cut-30"]
    assert list(map(cut_title, cuts)) == [
        "not pruned",
        "7 % pruned",
        "12.5 % pruned",
        "30 % pruned",
    ]
    assert cuts["cut-30"] == PruneConfig(rate=0.3)
    assert cuts["cut-30"].num_steps == 2
    [(name, cut)] = PruneConfig(layer_rate=0.25).cuts.items()
    assert (name, cut_title(name), cut.round_to) == ("layers-25", "25 % of each block pruned", 1)


def test_in_effect_resets_keys_without_effect() -> None:
    """A change of such a key must not make a stage run again."""
    idle = PruneConfig(importance="magnitude", order="second", aggregation="vector", norm="l1")
    assert idle.in_effect() == PruneConfig(importance="magnitude", norm="l1")


def test_verbs_functions_and_the_log_name_the_key_once(
    tiny_raw: Raw,
    write_yaml: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_yaml(with_key(tiny_raw, "finetune", {"steps": 4, "random_plans": 2}))
    done = command("check", file)
    assert done.exit_code == 0 and done.output.count(WITHOUT_COMPARE) == 1, done.output
    qpruner.run(file, until="prepare")
    told = capsys.readouterr()
    assert (told.out + told.err).count(WITHOUT_COMPARE) == 1
    assert (tmp_path / "run" / "qpruner.log").read_text().count(WITHOUT_COMPARE) == 1
