"""Mistakes in a configuration are refused with the key, the value, the rule and the remedy, before
expensive work.

Mistakes about the model, its rows, tasks or device are tested in
`tests/pipeline/test_preflight.py`.
"""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import Raw, changed_by, command, raw_config, run_program, said, with_keys

from qpruner.config.load import load_config, validate_config
from qpruner.config.schema import RunConfig
from qpruner.errors import ConfigError, UserError

RULES = [
    # unknown keys, wrong types
    ("outptu=x", "`outptu` is not a known key; did you mean `output`"),
    ("round_to=8", "`round_to` is not a known key; did you mean `prune.round_to`"),
    ("lora.rnak=8", "`lora.rnak` is not a known key; did you mean `lora.rank`"),
    (
        "data.train.0.spilt=x",
        "`data.train.0.spilt` is not a known key; did you mean `data.train.0.split`",
    ),
    (
        "prune.zzzz=1",
        "`prune.zzzz` is not a known key; known keys: aggregation, compensation, depth_share",
    ),
    ("model={}", "`model.source` is missing: give it as docs/configuration.md says"),
    ("lora.rank=eight", "`lora.rank` ... valid integer ... got 'eight'"),
    (
        "lora.rank=true",
        "`lora.rank`: must not be a boolean, got True (YAML reads yes ... give a number, or quote "
        "a word such as 'no'",
    ),
    ("data.train={source: x}", "`data.train`: must be a list, got {'source': 'x'}"),
    ("prune=3", "`prune`: must be a mapping of keys (a section), got 3"),
    ("output=''", "`output` ... at least 1 character, got ''"),
    ("data.train=[]", "`data.train`: must have at least 1 item, got []"),
    # choices
    ("prune.units=[heads]", "`prune.units.0` ... 'attention' or 'mlp', got 'heads'"),
    ("quantize.bits=[3, 8]", "`quantize.bits.0` ... 4, 8 or 16, got 3"),
    # bounds
    (
        "prune.rate=20",
        "`prune.rate` ... less than or equal to 0.9, got 20; it is a share: 20 % is 0.2",
    ),
    ("prune={layer_rate: 1}", "`prune.layer_rate` ... less than 1, got 1; it is a share"),
    (
        "quantize.budget={fraction: 1.5}",
        "`quantize.budget.fraction` ... equal to 1, got 1.5; it is a share",
    ),
    ("quantize.budget={gib: .inf}", "`quantize.budget.gib` ... finite number, got inf"),
    # within a section
    (
        "prune.layer_rate=0.25",
        "`prune`: give exactly one of rates, rate, layer_rate; got rate, layer_rate: take one out",
    ),
    (
        "prune={rates: [0, 0.2], rate: 0.1}",
        "give exactly one of rates, rate, layer_rate; got rates, rate: take one out",
    ),
    (
        "prune={rates: [0.2, 0.1]}",
        "`rates` must be different shares in ascending order, got [0.2, 0.1]",
    ),
    (
        "prune={rates: [0.1, 0.1000000000001]}",
        "`rates` must be different shares in ascending order, got [0.1, 0.1000000000001]",
    ),
    ("prune={rates: [0, 0.95]}", "`prune.rates.1` ... less than or equal to 0.9, got 0.95"),
    ("prune={rates: null}", "`prune`: give exactly one of rates, rate, layer_rate; got none"),
    (
        "prune={layer_rate: 0.2, units: [block, mlp]}",
        "`layer_rate` applies to ... take `block` out of `units`",
    ),
    (
        "prune={layer_rate: 0.2, selection: global}",
        "`layer_rate` needs `selection: per_layer` ... got global",
    ),
    (
        "prune={uniform: true, selection: global}",
        "`uniform` needs `selection: per_layer` ... got global: take",
    ),
    (
        "prune.reduction=product",
        "`reduction: product` needs `selection: per_layer` ... such as sum",
    ),
    ("quantize.formats=[nf4]", "give `formats` or `bits`, not both: take one out"),
    (
        "quantize.bits=; quantize.formats=[nf5]",
        "`formats`: there is no format `nf5`; name some of ... nf4 ... int8",
    ),
    (
        "quantize.bits=; quantize.formats=[nf4, nf4]",
        "`quantize.formats`: must name each once, got nf4, nf4",
    ),
    (
        "quantize.embeddings=[nf4]",
        "`embeddings`: nf4 cannot hold embeddings; name some of ... int8 ... bf16",
    ),
    (
        "quantize.embeddings=[int8]",
        "`quantize.budget.fraction` has no one meaning ... `quantize.budget.bytes`",
    ),
    (
        "prune={}; quantize={}",
        "`quantize.budget.fraction` has no ... (`prune.rates`), got 0.5, the default: give",
    ),
    (
        "prune={}; quantize.budget={mean_bits: 5}",
        "`quantize.budget.mean_bits` ... (`prune.rates`), got 5: give",
    ),
    (
        "quantize.rounding=gptq; quantize.bits=[4]; lora.init=plain",
        "`quantize.rounding: gptq` changes nothing ... and the formats nf4: take one of w2 ... "
        "q5_1, or `lora",
    ),
    (
        "quantize.rounding=gptq; lora.init=plain",
        "`quantize.rounding: gptq` changes nothing ... and the formats nf4, int8: take one of w2 "
        "... q5_1, or `lora",
    ),
    (
        "training.method=scales",
        "`training.method: scales` needs formats with scales to train, but `quantize.formats` has "
        "nf4, int8: name some of ... q4_0 ... bf16, or take `training.method: adapter`",
    ),
    (
        "training.method=scales; quantize.bits=; quantize.formats=[q4_0]; serve.to=[gguf_merged]",
        "`training.method: scales` gives one plain file ... `serve.to` has gguf_merged: name gguf",
    ),
    (
        "training.method=scales; quantize.bits=; quantize.formats=[q4_0, w4]; serve.to=[vllm]",
        "but a file for vllm (`serve.to`) cannot store q4_0: name other formats",
    ),
    ("quantize.bits=[8, 4]", "`bits` must be different bit-widths in ascending order, got [8, 4]"),
    (
        "quantize.budget={}",
        "`quantize.budget`: give exactly one of fraction, mean_bits, gib, bytes; got none",
    ),
    (
        "quantize.budget={fraction: 0.5, mean_bits: 5}",
        "give exactly one of ... got fraction, mean_bits: take one out",
    ),
    (
        "training.batch_size=6",
        "`batch_size` must be a multiple of `micro_batch_size`, got 6 and 4: take another",
    ),
    ("search.first_rung=9", "`first_rung` must be at most `steps` (4), got 9"),
    ("search.metric=accuracy", "`metric: accuracy` needs at least one task under `tasks`"),
    (
        "search={metric: accuracy, tasks: [piqa]}",
        "`metric: accuracy` needs a `limit` of at least 2 ... got None",
    ),
    (
        "search.resources_per_trial={gpu: 1.5}",
        "`gpu` must be a share ... such as 0.5, or a whole number, got 1.5",
    ),
    (
        "finetune={steps: 4, epochs: 1}",
        "`finetune`: give exactly one of steps, epochs; got steps, epochs: take one out",
    ),
    ("finetune={}", "`finetune`: give exactly one of steps, epochs; got none"),
    (
        "evaluate.text=[{source: x}]",
        "`text` is running text: give its sources `format: text`, got instruction",
    ),
    (
        "card.base_model=./base",
        "`card.base_model`: must be a hub id ... such as Hugging ... got './base'",
    ),
    (
        "card.datasets=[me/rows, package:x]",
        "`card.datasets.1`: must be a hub id ... got 'package:x'",
    ),
    ("card.license=Apache 2.0", "`card.license`: must be ... such as apache-2.0, got 'Apache 2.0'"),
    # between sections
    (
        "search.plan=kl; sensitivity.methods=[fisher]",
        "`search.plan` ... kl ... not measured ... ['fisher']",
    ),
    (
        "search.plan=kl; quantize.bits=[4]",
        "`search.plan` ... not measured ... two formats or more ... got nf4",
    ),
    (
        "search.tasks=[qpruner_everyday_test]",
        "`evaluate.tasks` must not share ... both name qpruner_everyday_test",
    ),
    (
        "finetune.num_workers=2",
        "`training.batch_size` must be a multiple of ... (2 x 4), got 4 ... take fewer workers",
    ),
    (
        "finetune.num_workers=2; training.batch_size=8; search.resources_per_trial={gpu: 2}",
        "`finetune.num_workers` above 1 needs workers with one GPU each, got 2 with ... 2: ... not "
        "both",
    ),
]


@pytest.mark.parametrize(("change", "message"), RULES, ids=[change for change, _ in RULES])
def test_a_broken_rule_names_key_value_and_remedy(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(changed_by(change, raw_config(Path("model"), Path("run"))))
    assert caught.value.exit_code == 2
    assert said(message, str(caught.value)), str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    raw = changed_by(
        "lora.rank=0; prune.rate=2; prune.rat=1; search.first_rung=9",
        raw_config(Path("m"), Path("run")),
    )
    with pytest.raises(ConfigError) as caught:
        validate_config(raw)
    assert len(caught.value.problems) == 4
    assert "4 problems" in str(caught.value)


# ---- the file itself, and --set


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"lora:\n  rank: 4\n  rank: 8\n", "`rank` is given twice ... line 3"),
        (b"lora: [1\n", "not valid YAML ... expected ',' or ']' ... line ... see tune_configs/"),
        (
            b"lora:\n\trank: 1\n",
            "not valid YAML ... line 2, column 1 ... replace its tabs by spaces",
        ),
        (b"- output\n- model\n", "mapping of sections, got list; see tune_configs/"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"seed: !!python/object:os.system x\n", "not valid YAML ... python/object"),
    ],
    ids=range(6),
)
def test_an_invalid_file_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and said(message, str(caught.value)), str(caught.value)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"configuration file .* does not exist.*tune_configs/"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="is a folder; give a configuration file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank", "section.key=value, such as search.max_trials=20; got 'lora.rank'"),
        (
            "model.source.x=3",
            "model.source.x=3: `source` is not a section; `qpruner check --show-config` prints",
        ),
        ("lora.rank=[", "lora.rank=[: the value is not valid YAML"),
        ("lora.rnak=3", "`lora.rnak` ... did you mean `lora.rank`"),
        (
            "search.max_hours=",
            "the file has no `search.max_hours` to remove: its default holds already",
        ),
        (
            "search.confrim=",
            "search.confrim=: `search.confrim` is not a known key; did you mean `search.confirm`?",
        ),
        ("data.train.0.columns.text=", "the file has no `data.train.0.columns.text` to remove"),
        (
            "data.train.9.limit=3",
            "data.train.9.limit=3: `9` must be the number of an item, counted from 0 ... 1 item",
        ),
        ("data.train.first.limit=3", "`first` must be the number of an item"),
        ("finetune.epochs=1", "got steps, epochs: take one out ... `--set finetune.steps=`"),
        ("quantize.budget.bytes=9", "exactly one ... bytes ... `--set quantize.budget.fraction=`"),
    ],
)
def test_a_wrong_override_is_refused(
    override: str, message: str, write_yaml: Callable[..., Path]
) -> None:
    path = write_yaml(raw_config(Path("model"), Path("run")))
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    assert said(message, str(caught.value)), str(caught.value)


def test_overrides_remove_keys_and_change_list_items(write_yaml: Callable[..., Path]) -> None:
    raw = changed_by("finetune.random_plans=1", raw_config(Path("model"), Path("run")))
    path = write_yaml(raw)

    def load(*overrides: str) -> RunConfig:
        return load_config(path, list(overrides))

    # This is the default.
    assert load("finetune.random_plans=").finetune.random_plans == 3
    # The rate is null beside `layer_rate`.
    assert load("prune.rate=", "prune.layer_rate=0.2").prune.rate is None
    budget = "quantize.budget={bytes: 1000}"
    # This is the default.
    assert load("prune.rate=", budget).prune.rates == (0.0, 0.1, 0.2)
    data = load("data.validation.0.split=train[:3]", "data.train.0.limit=8").data
    assert data.validation[0].split == "train[:3]"
    assert data.train[0].limit == 8
    # The item's other keys stay.
    assert data.train[0].source == raw["data"]["train"][0]["source"]
    assert load("model.revision=null").model.revision is None


# ---- the command line

WITHOUT_BAYESOPT = pytest.mark.skipif(
    find_spec("bayes_opt") is not None, reason="the extra is installed"
)
WORKERS = {"finetune.num_workers": 999, "training.batch_size": 999 * 4}
COMMANDS = [
    pytest.param("check", {"lora.rnak": 8}, (), "did you mean `lora.rank`", id="unknown-key"),
    pytest.param(
        "check", {}, ("--address", "127.0.0.1:1"), "cannot join a Ray cluster there", id="address"
    ),
    pytest.param(
        "run",
        {"search.searcher": "bayesopt"},
        (),
        "qpruner[bayesopt]",
        id="extra",
        marks=WITHOUT_BAYESOPT,
    ),
    pytest.param("run", WORKERS, (), "999 workers with", id="workers"),
]


@pytest.mark.parametrize(("verb", "change", "options", "message"), COMMANDS)
def test_a_command_with_a_mistake_exits_with_code_2(
    verb: str,
    change: Raw,
    options: tuple[str, ...],
    message: str,
    tiny_raw: Raw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(with_keys(tiny_raw, **change)))
    done = command(verb, "config.yaml", "--json", *options)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == "error"
    assert message in told["error"]
    # No stage has run.
    assert not (tmp_path / "run" / "prepare").exists()


def test_an_error_goes_to_stderr_without_a_traceback(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "qpruner", "check", "none.yaml")
    done = run_program(*command, code=2, folder=tmp_path)
    assert done.stdout == ""
    assert done.stderr.startswith("error: configuration file ")
    assert "Traceback" not in done.stderr
