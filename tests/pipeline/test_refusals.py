"""Bad models, rows and tasks, one a row: each is refused, or warned about, before a weight is loaded.

A row is what to change in a configuration that is otherwise accepted, and what the error must hold: the key, the value
found, the rule it breaks, the remedy. The configuration alone: `tests/config/test_bad_input.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DEMO_DATA, changed_by, demo_rows, disk_of, raw_config, said, with_key

from qpruner.config.load import validate_config
from qpruner.config.schema import DataSource, RunConfig
from qpruner.data.sources import load_examples, normalized
from qpruner.errors import ConfigError, UserError
from qpruner.models.families import families
from qpruner.pipeline.preflight import Inspection, inspect
from qpruner.pipeline.preflight_rows import num_cut
from qpruner.pipeline.run import check
from qpruner.plans.plan import PrecisionPlan

QUESTIONS = "package:qpruner/demo/data/questions_{}.jsonl"
TEST_TASK, SEARCH_TASK = "qpruner_everyday_test", "qpruner_everyday_validation"
BY_ACCURACY = f"search.metric=accuracy; search.tasks=[{SEARCH_TASK}]; search.limit="
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="refused on a CPU only")


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads weights while an input is judged fails the test."""
    from transformers import PreTrainedModel

    def refuse(*args: object, **options: object) -> None:
        pytest.fail("weights were loaded before the input was refused")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


@pytest.fixture
def inspected(tiny_raw: dict[str, Any]) -> Callable[[str | dict[str, Any]], Inspection]:
    """What an inspection finds with some keys changed."""
    return lambda change: inspect(config_of(change, tiny_raw))


def config_of(change: str | dict[str, Any], raw: dict[str, Any]) -> RunConfig:
    if isinstance(change, str):
        return validate_config(changed_by(change, raw) if change else raw)
    for key, value in change.items():
        raw = with_key(raw, key, value)
    return validate_config(raw)


def refused_with(message: str, change: str | dict[str, Any], raw: dict[str, Any]) -> None:
    """Nothing is left behind, and the message has all its parts."""
    with pytest.raises(UserError) as caught:
        inspect(config_of(change, raw))
    assert caught.value.exit_code == 2
    assert said(message, str(caught.value)), str(caught.value)
    assert not Path(raw["output"]).exists(), "a refusal leaves nothing behind"


def test_the_configuration_that_the_rows_spoil_is_accepted(inspected: Any, tmp_path: Path) -> None:
    assert inspected("").budget_bytes > 0
    assert not (tmp_path / "run").exists(), "inspecting leaves nothing behind"


# ---- what cannot be for this model, budget or device

MODEL = [
    ("prune.rate=0.6; prune.first_layer=1", "`prune.rate` ... 0.6 ... at least one unit ... lower the rate, widen"),
    ("prune.last_layer=7", "`prune.last_layer` 7 ... within the model's 2 blocks ... 0 to 1"),
    ("prune.first_layer=1; prune.last_layer=0", "`prune.first_layer` 1 ... `prune.last_layer` 0 ... must be a range"),
    ("prune.protected_layers=[0, 2]", "`prune.protected_layers` ... no block 2 ... the model has 2 ... 0 to 1"),
    ("prune.protected_layers=[0, -1]", "`prune.protected_layers` ... no block ... may be cut ... name fewer"),
    ("prune.round_to=320", "`prune.round_to` ... got 320 ... at most the 256 MLP channels"),
    ("prune={layer_rate: 0.2, round_to: 320}", "`prune.round_to` ... got 320 ... `prune.layer_rate` is 0.2"),
    ("prune={layer_rate: 0.999, round_to: 1}", "would leave 0 of the 2 attention units of block 0 ... lower it"),
    ("prune.round_to=256; prune.units=[mlp]", "`prune.rate` ... 0.2 ... at most 0 can ... lower the rate"),
    pytest.param(
        "prune.round_to=32", "`quantize.bits` ... has 160 columns ... wrongly ... `prune.round_to: 64`", marks=ON_CPU
    ),
    pytest.param(
        "prune.round_to=32; prune.selection=global; prune.rate=0.1",
        "`prune.round_to` must be a multiple of 64 ... 4-bit layers on a CPU, got 32",
        marks=ON_CPU,
    ),
    (
        "prune.rate=0.5; prune.units=[attention]",
        "`prune.rate` ... at least one unit of each kind ... name more `prune.units`",
    ),
    (
        "prune.units=[attention, expert]",
        "`prune.units` ... expert ... no block of this llama model has such ... leave it out",
    ),
    ("prune.rate=0.1; prune.units=[block]", "`prune.rate` ... 10.00% ... but one block has 42.85% ... raise the rate"),
    ("prune.rate=0.5; prune.units=[block]; prune.first_layer=1", "`prune.units` ... one must stay ... widen"),
    ("prune.uniform=true; prune.first_layer=1", "`prune.uniform` ... only 1 may be cut ... `uniform: false`"),
    (
        "prune.uniform=true; prune.compensation=bias",
        "`prune.compensation` ... no place for output biases ... least_squares",
    ),
    (
        "quantize.budget={bytes: 1000}",
        "`quantize.budget.bytes` ... every group at 4 ... the smallest that works is ... 1000",
    ),
    (
        "quantize.budget={bytes: 1000}; quantize.bits=[4]",
        "`quantize.budget.bytes` is below the pruned model with every group",
    ),
    ("quantize.budget={fraction: 0}", "`quantize.budget.fraction` ... no choice but ... at 4 bits ... got 0.0"),
    (
        "quantize.budget={fraction: 1}",
        "`quantize.budget.fraction` ... every group fits at 8 bits ... the largest ... got 1.0",
    ),
    (
        "quantize.budget={gib: 1}",
        "`quantize.budget.gib` ... every group fits at 8 bits ... got 1.0 ... `search.pareto`",
    ),
    ("quantize.budget={mean_bits: 9}", "`quantize.budget.mean_bits` must be between the lowest ... 4 and 8, got 9"),
    pytest.param(
        "model.dtype=float16", "`model.dtype`: float16 cannot be trained on a CPU; use bfloat16", marks=ON_CPU
    ),
    ("output=TMP/empty.jsonl", "`output` ... empty.jsonl ... is a file ... name a folder"),
    ("output=TMP/empty.jsonl/run", "`output` ... empty.jsonl ... is a file ... name a folder"),
]
SOURCES = [
    ("TMP/none", "TMP/none ... does not exist ... name a model folder"),
    (
        "nobody/no-such-model",
        "no model config can be read from 'nobody/no-such-model' ... see that the hub has this id",
    ),
    ("runs/mine/prune", "CWD/runs/mine/prune ... is no hub id ... name a model folder"),
    ("../mine", "CWD/../mine ... does not exist ... name a model folder"),
    ("~/no-such-model", "HOME/no-such-model ... does not exist ... name a model folder"),
    ("TMP/empty.jsonl", "TMP/empty.jsonl ... is a file ... name a model folder"),
    ("package:no_such_package/model.gguf", "package `no_such_package` ... not installed ... install it"),
    ("package:qpruner/demo/model.gguf", "package `qpruner` has no file `demo/model.gguf` ... name"),
    ("TMP/none.gguf", "TMP/none.gguf ... does not exist ... name"),
    ("TMP/text.gguf", "TMP/text.gguf ... not a GGUF file"),
]


def filled(text: str, folder: Path) -> str:
    return text.replace("TMP", str(folder)).replace("CWD", str(Path.cwd())).replace("HOME", str(Path.home()))


@pytest.mark.parametrize(("change", "message"), MODEL)
def test_a_cut_or_budget_that_cannot_be_is_refused(
    change: str, message: str, tiny_raw: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    refused_with(message, filled(change, tmp_path), tiny_raw)


@pytest.mark.parametrize(("source", "message"), SOURCES)
def test_a_source_of_no_model_is_refused(source: str, message: str, tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "text.gguf").write_text("hello world")
    change = {"model.source": filled(source, tmp_path)}
    refused_with(f"`model.source` ... {filled(message, tmp_path)}", change, tiny_raw)


def _config_keys(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _second_shard_missing(folder: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": first, "model.embed_tokens.weight": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_not_json(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")  # else no index is read
    (folder / "model.safetensors.index.json").write_text('{"wei')


def _gpt2(folder: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=300, bos_token_id=0, eos_token_id=1).save_pretrained(folder)


def _mixtral(folder: Path) -> None:
    _config_keys(folder, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)


SPOILT: list[tuple[Callable[[Path], object], str, str]] = [
    (lambda folder: (folder / "config.json").unlink(), "", "no config.json ... name a model folder"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "lla'), "", "not a valid JSON file"),
    (
        lambda folder: _config_keys(folder, num_attention_heads=3),
        "",
        "not a multiple of the number of attention heads (3)",
    ),
    (_pickled_only, "", "pickled .bin weights are not read ... save_pretrained"),
    (_second_shard_missing, "", "model-00002-of-00002.safetensors ... lacks ... fetch"),
    (_index_not_json, "", "model.safetensors.index.json ... not valid JSON ... fetch"),
    (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "", "model.safetensors ... truncated ... fetch"),
    (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "", "tokenizer"),
    (lambda folder: _config_keys(folder, quantization_config={"bits": 4}), "", "already quantized ... full-precision"),
    (_gpt2, "", f"`gpt2` ... not supported ... supported: {', '.join(families())}"),
    (
        _mixtral,
        "prune.importance=fluctuation",
        "mlp.experts.gate_up_proj ... stacked in one parameter ... taylor, magnitude",
    ),
    (
        _mixtral,
        "prune={importance: magnitude, compensation: none, round_to: 12}",
        "`prune.round_to` ... got 12 ... a multiple of 8 ... experts of a mixtral model",
    ),
]


@pytest.mark.parametrize(("spoil", "change", "message"), SPOILT, ids=range(len(SPOILT)))
def test_a_spoilt_model_folder_is_refused(
    spoil: Callable[[Path], object], change: str, message: str, tiny_raw: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_raw["model"]["source"], tmp_path / "model"))
    spoil(folder)
    raw = with_key(tiny_raw, "model.source", str(folder))
    refused_with(message if change else f"`model.source` ... {message}", change, raw)


@pytest.mark.parametrize("size", [slice(100), slice(-5000)], ids=["header", "weights"])
def test_a_truncated_gguf_file_is_refused(size: slice, tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    path = tmp_path / "part.gguf"
    writer = GGUFWriter(path, "llama")
    for name, count in (("block_count", 1), ("context_length", 64), ("embedding_length", 64), ("head_count", 2)):
        getattr(writer, f"add_{name}")(count)
    writer.add_feed_forward_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(100)
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[size])
    refused_with(f"`model.source` ... {path} ... truncated ... fetch", {"model.source": str(path)}, tiny_raw)


# ---- what is wrong with rows and tasks


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


QUESTION = {"question": "Is water wet?", "choices": {"text": ["no", "yes"], "label": ["A", "B"]}, "answerKey": "B"}
FILES = {
    "rows.xlsx": "PK",
    "bad.jsonl": "{not json\n",
    "empty.jsonl": "",
    "bare.jsonl": jsonl({"q": "?", "choices": ["a"], "answerKey": "A"}),
    "label.jsonl": jsonl(QUESTION, QUESTION | {"answerKey": "E"}),
    "text.txt": "\n\n\n\n".join(f"Paragraph {number} of a text." for number in range(3)) + "\n",
    "cut.json": "[[1, 2",
    "none.json": "[]",
    "flat.json": "[1, 2, 3]",
    "beyond.json": "[[1, 2], [3, 512]]",
    "fraction.json": "[[1, 2.0]]",
    "words.json": '[["Hello"]]',
    "short.json": "[[1, 2], [3]]",
}
TEXT = "[{source: TMP/text.txt, format: text}]"
DATA = [
    ("data.train.0.source=/no/such.jsonl", "`data.train.0.source` ... /no/such.jsonl ... does not exist ... name"),
    (
        "data.train.0.source=TMP/rows.xlsx",
        "`data.train.0.source` ... no data file ... .jsonl, .json, .parquet, .csv, .tsv",
    ),
    (
        "data.train.0.source=TMP/bad.jsonl",
        "`data.train.0.source` ... TMP/bad.jsonl ... line 1 is no JSON ... name another",
    ),
    ("data.train.0.source=TMP/empty.jsonl", "`data.train.0.source` ... TMP/empty.jsonl ... empty ... name another"),
    ("data.train.0.split=trian", "`data.train.0.source` ... `split: trian` ... Unknown split ... ['train']"),
    (
        "data.train.0.source=TMP/bare.jsonl",
        "`data.train.0.columns.question` ... no column ... they have q, choices, answerKey",
    ),
    (
        "data.train.0.columns={answer: solution}",
        "`data.train.0.columns.answer` ... solution ... no column ... they have id",
    ),
    (
        "data.train.0.columns={quetsion: x}",
        "`data.train.0.columns` ... quetsion ... have the columns question, choices, answer",
    ),
    (
        "data.train.0.columns={question: [question, topic]}",
        "`data.train.0.columns.question` ... question, topic ... one column",
    ),
    ("data.train.0.columns={choices: question}", "`data.train.0.columns.choices` ... question ... list"),
    (
        "data.train.0.source=TMP/label.jsonl",
        "`data.train.0.columns.answer` ... 'E' ... one of the labels A, B ... from 0 to 1",
    ),
    ("data.max_length=8", "`data.max_length` ... 8 ... no row a token to predict ... make it longer"),
    (
        "data.confirmation.0.limit=1",
        "`data.confirmation` must have at least 2 rows that differ ... got 1 ... raise its `limit`",
    ),
    (
        "data.template=chat; data.train.0={source: package:qpruner/demo/data/instructions.jsonl}",
        "`data.template: chat` ... needs a tokenizer with a chat template ... use alpaca",
    ),
    (
        "calibration.num_sensitivity_samples=64",
        "num_sensitivity_samples` ... 64 samples ... make 48 ... ask for fewer, give more",
    ),
    (
        "calibration.num_samples=64; calibration.packing=false",
        "`calibration.num_samples` ... 64 samples ... make 48 ... ask for",
    ),
    (
        "calibration.num_samples=4000",
        "`calibration.num_samples` ... 4000 samples of exactly 128 tokens ... `calibration.packing: false`",
    ),
    (
        "calibration.max_length=1000000",
        "`calibration.num_samples` ... 8 samples of exactly 1000000 tokens ... make `calibration.max_length`",
    ),
    (
        f"calibration.data={TEXT}; calibration.packing=false; calibration.num_sensitivity_samples=8",
        "`calibration.num_samples` ... 8 samples ... the calibration rows make 3 ... ask for fewer",
    ),
    (
        "calibration.token_ids=/no/ids.json",
        "`calibration.token_ids` ... /no/ids.json ... cannot be read ... No such file",
    ),
    ("calibration.token_ids=TMP/cut.json", "`calibration.token_ids` ... cut.json ... Invalid JSON"),
    (
        "calibration.token_ids=TMP/none.json",
        "`calibration.token_ids` ... none.json ... at least 1 item ... lists of two token ids",
    ),
    ("calibration.token_ids=TMP/flat.json", "`calibration.token_ids` ... flat.json ... such as [["),
    ("calibration.token_ids=TMP/beyond.json", "`calibration.token_ids` ... [1] ... is 512: ... from 0 to 511"),
    ("calibration.token_ids=TMP/fraction.json", "`calibration.token_ids` ... is 2.0: ... a whole number"),
    ("calibration.token_ids=TMP/words.json", "`calibration.token_ids` ... is 'Hello': ... a whole number"),
    ("calibration.token_ids=TMP/short.json", "`calibration.token_ids` ... [1] is ... lists of two token ids or more"),
    (
        "evaluate.tasks=[qpruner_everyday_tset]",
        f"`evaluate.tasks` ... has no task `qpruner_everyday_tset` ... did you mean {TEST_TASK}",
    ),
    (
        "search.tasks=[qpruner_everyday_tset]",
        f"`search.tasks` ... has no task `qpruner_everyday_tset` ... did you mean {TEST_TASK}",
    ),
    (
        f"search.metric=acc_norm; search.tasks=[{SEARCH_TASK}]; search.limit=8",
        f"`search.metric` ... got acc_norm, but `{SEARCH_TASK}` ... name one that all",
    ),
    (f"{BY_ACCURACY}61", "`search.limit` ... leave as many questions of every task ... 120, got 61 ... lower it to 60"),
    ("evaluate.include_path=/no/tasks", "`evaluate.include_path` ... /no/tasks ... does not exist ... name"),
    (
        "evaluate.include_path=package:qpruner/demo/__init__.py",
        "`evaluate.include_path` ... is a file ... name a folder",
    ),
]
OVERLAPS = [
    ("data.validation.0.source", "train", "`data.train` ... `data.validation` share 16"),
    ("data.confirmation.0.source", "validation", "`data.validation` ... `data.confirmation` share 16"),
    ("data.train.0.source", "test", "`data.train` ... `evaluate.tasks` share 8"),
    ("calibration.data", "test", "`calibration.data` ... `evaluate.tasks`"),
    ("evaluate.text", "confirmation", "`data.confirmation` ... `evaluate.text` share"),
]


@pytest.mark.parametrize(("change", "message"), DATA)
def test_bad_rows_and_tasks_are_refused(change: str, message: str, tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    refused_with(filled(message, tmp_path), filled(change, tmp_path), tiny_raw)


@pytest.mark.parametrize(("key", "split", "message"), OVERLAPS)
def test_rows_of_two_uses_must_not_overlap(key: str, split: str, message: str, tiny_raw: dict[str, Any]) -> None:
    source = QUESTIONS.format(split)
    rows = [{"source": source, "format": "multiple_choice"}]
    text = [{"source": source, "format": "text", "columns": {"text": "question"}}]
    value: Any = {"calibration.data": rows, "evaluate.text": text}.get(key, source)
    refused_with(f"{message} ... must not overlap ... take other rows", {key: value}, tiny_raw)


def test_no_row_of_the_demo_is_shared() -> None:
    """The overlaps above mean something only if the demo's own files are disjoint."""
    names = ("train", "validation", "confirmation", "test")
    questions = [{row["question"] for row in demo_rows(f"questions_{name}.jsonl")} for name in names]
    assert sum(map(len, questions)) == len(set().union(*questions))


@pytest.fixture
def demo_tasks(tmp_path: Path) -> Path:
    """The demo's tasks and rows, to be changed."""
    return Path(shutil.copytree(DEMO_DATA.parent, tmp_path / "demo")) / "tasks"


def test_a_search_task_of_the_test_s_questions_is_refused(demo_tasks: Path, tiny_raw: dict[str, Any]) -> None:
    text = (demo_tasks / f"{TEST_TASK}.yaml").read_text()
    (demo_tasks / "copy.yaml").write_text(text.replace(f"task: {TEST_TASK}", "task: copy_of_test"))
    change = {"search.tasks": ["copy_of_test"], "evaluate.include_path": str(demo_tasks)}
    refused_with("`search.tasks` ... `evaluate.tasks` ... must not overlap", change, tiny_raw)


@pytest.mark.parametrize("section", ["search", "evaluate"])
def test_a_task_without_accuracy_is_refused(section: str, demo_tasks: Path, tiny_raw: dict[str, Any]) -> None:
    text = (demo_tasks / f"{SEARCH_TASK}.yaml").read_text().replace(f"task: {SEARCH_TASK}", "task: likelihood")
    task = yaml.load(text.replace("!function rows.load", "FUNCTION"), yaml.SafeLoader)
    task |= {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}", "doc_to_text": ""}
    task["metric_list"] = [{"metric": "bits_per_byte"}]
    del task["doc_to_choice"]
    (demo_tasks / "likelihood.yaml").write_text(yaml.safe_dump(task).replace("FUNCTION", "!function rows.load"))
    change = {f"{section}.tasks": ["likelihood"], "evaluate.include_path": str(demo_tasks)}
    message = "reports bits_per_byte ... none of acc_norm, acc, exact_match ... name a task that reports an accuracy"
    refused_with(f"`{section}.tasks` ... {message}", change, tiny_raw)


def test_a_task_whose_answer_is_no_choice_is_refused(demo_tasks: Path, tiny_raw: dict[str, Any]) -> None:
    """A task file that takes the answers' positions for one more than they are."""
    task = demo_tasks / f"{TEST_TASK}.yaml"
    task.write_text(task.read_text().replace("choices.label.index(answerKey)", "choices.label.index(answerKey) + 1"))
    message = (
        f"`evaluate.tasks`: question ... of task `{TEST_TASK}` has the answer 4 ... none of its 4 choices ... 0 to 3"
    )
    refused_with(message, {"evaluate.include_path": str(demo_tasks)}, tiny_raw)


def test_a_task_s_rows_that_are_no_json_are_refused(tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    """With what the reader says, not only that generating the data set failed."""
    (tmp_path / "questions.jsonl").write_text('{"question": "a"}\n{"question": }\n')
    task = {"task": "mine", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "questions.jsonl")}}
    task |= {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task | {"metric_list": [{"metric": "acc"}]}))
    change = {"evaluate.include_path": str(tmp_path), "evaluate.tasks": ["mine"]}
    refused_with("rows of mine cannot be loaded: JSON parse error", change, tiny_raw)


def test_model_rows_and_tasks_are_refused_at_once(tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    """Each look takes a person's time, and one at a cluster more."""
    (tmp_path / "bare.jsonl").write_text('{"x": 1}\n')
    change = {
        "model.source": "/no/model",
        "data.train": [{"source": "/no/rows.jsonl"}, {"source": str(tmp_path / "bare.jsonl")}],
        "data.confirmation": [{"source": "/no/others.jsonl"}],
        "evaluate.tasks": ["no_such_task"],
    }
    with pytest.raises(ConfigError) as caught:
        inspect(config_of(change, tiny_raw))
    told = ("/no/model", "/no/rows.jsonl", "`data.train.1.columns", "/no/others.jsonl", "`no_such_task`")
    assert len(caught.value.problems) == len(told), caught.value.problems
    assert all(part in problem for part, problem in zip(told, caught.value.problems, strict=True))


# ---- budgets that the errors name


def test_the_smallest_budget_that_the_error_names_works(inspected: Any) -> None:
    with pytest.raises(UserError) as caught:
        inspected("quantize.budget={bytes: 1}")
    found = re.search(r"smallest that works is (\d+) bytes \(([\d.]+) GiB\)", str(caught.value))
    assert found, str(caught.value)
    smallest = int(found[1])
    inspection = inspected(f"quantize.budget={{bytes: {smallest}}}")
    layout = inspection.pruned
    names = layout.uniform(4).groups
    every = itertools.product((4, 8), repeat=len(layout.groups))
    weights = sorted(layout.plan_bytes(PrecisionPlan(names, bits)) for bits in every)
    assert weights[0] < smallest == weights[1] == inspection.budget_bytes, "the first budget that leaves a choice"
    assert inspected(f"quantize.budget={{gib: {found[2]}}}").budget_bytes >= smallest
    with pytest.raises(UserError, match="smallest that works"):
        inspected(f"quantize.budget={{bytes: {smallest - 1}}}")
    with pytest.raises(UserError, match=f"leaves no choice but .* every group at 4 bits, {weights[0]} bytes"):
        inspected(f"quantize.budget={{bytes: {weights[0]}}}; search.pareto=true")


def test_the_largest_budget_that_the_error_names_works(inspected: Any) -> None:
    """And a front may have all of it."""
    with pytest.raises(UserError) as caught:
        inspected("quantize.budget={fraction: 1.0}")
    found = re.search(r"the largest (\d+) bytes \(([\d.]+) GiB\)", str(caught.value))
    assert found, str(caught.value)
    largest = int(found[1])
    assert inspected(f"quantize.budget={{bytes: {largest}}}").budget_bytes == largest
    assert inspected(f"quantize.budget={{gib: {found[2]}}}").budget_bytes <= largest
    with pytest.raises(UserError, match="leaves nothing to choose"):
        inspected(f"quantize.budget={{bytes: {largest + 1}}}")
    assert inspected("quantize.budget={fraction: 1.0}; search.pareto=true").budget_bytes == largest + 1


# ---- warnings


@pytest.fixture
def warned(inspected: Any) -> Callable[..., list[str]]:
    """The warnings on something; else all but those of the scene's few rows and questions to score on."""

    def warnings(change: str | dict[str, Any], about: str | None = None) -> list[str]:
        few = (" tokens of ", "over so few")
        every = inspected(change).warnings
        return [each for each in every if (about in each if about else not any(part in each for part in few))]

    return warnings


def test_rows_without_a_response_are_a_warning(warned: Any, tmp_path: Path) -> None:
    """An empty cell, and a row of a file that lacks the column."""
    rows = [{"instruction": f"Say {number}.", "output": "it"} for number in range(40)]
    rows[3], rows[7] = {"instruction": "Explain tea.", "output": " "}, {"instruction": "Explain salt."}
    (tmp_path / "rows.jsonl").write_text(jsonl(*rows))
    change = {"data.train": [{"source": str(tmp_path / "rows.jsonl")}], "data.max_length": 256}
    (warning,) = warned(change, "have no response")
    assert said("2 rows of `data.train` of 40 ... 'Explain tea.' ... leave them out", warning)
    assert warned("", "have no response") == []


def test_rows_without_room_for_a_response_are_a_warning(warned: Any, tmp_path: Path) -> None:
    """Rows that lose their ends alone are none: that is what `data.max_length` is for, and `check` counts them."""
    rows = [{"instruction": "Say it.", "output": "word " * 8} for _ in range(30)]
    rows += [{"instruction": f"Say {number}.", "output": "word " * 300} for number in range(7)]
    (tmp_path / "cut.jsonl").write_text(jsonl(*rows))
    rows += [{"instruction": f"Say {number} " * 150, "output": "it"} for number in range(3)]
    (tmp_path / "lost.jsonl").write_text(jsonl(*rows))
    cut, lost = ([{"source": str(tmp_path / name)}] for name in ("cut.jsonl", "lost.jsonl"))
    (warning,) = warned({"data.train": lost, "data.max_length": 256}, "all of their response")
    assert said("about 3 of 40 rows of `data.train` ... `data.max_length` of 256 tokens or more", warning)
    assert warned({"data.train": lost, "data.max_length": 512}, "all of their response") == []
    assert warned({"data.train": cut, "data.max_length": 256, "search.max_trials": 8}) == []
    assert num_cut(load_examples([DataSource(source=cut[0]["source"])], "data.train"), 256) == 7


def test_too_few_tokens_to_score_on_are_a_warning(warned: Any, tmp_path: Path) -> None:
    """Every other confirmation row chooses."""
    for warning, key, rows in zip(warned("", "tokens of"), ("validation", "confirmation"), (16, 8), strict=True):
        tokens = re.search(
            rf"`data.{key}` .* on about (\d+) tokens of {rows} rows: too few to tell plans apart", warning
        )
        assert tokens and 0 < int(tokens[1]) < 500, warning
        assert "more rows" in warning and "500 tokens at least" in warning

    def rows_of(*texts: str, **keys: Any) -> dict[str, Any]:
        (tmp_path / "rows.jsonl").write_text(jsonl(*({"text": f"{row} {text}"} for row, text in enumerate(texts))))
        return {"data.validation": [{"source": str(tmp_path / "rows.jsonl"), "format": "text"}], **keys}

    for enough in (["word " * 20] * 40, ["\u5b57" * 20] * 40):
        (confirmation,) = warned(rows_of(*enough), "tokens of")
        assert "`data.confirmation`" in confirmation
    validation, _ = warned(rows_of("word " * 10_000, **{"data.max_length": 64}), "tokens of")
    assert "about 64 tokens of 1 row:" in validation, "a row is cut"
    assert warned(f"{BY_ACCURACY}8", "tokens of") == []


def test_too_few_questions_are_a_warning(warned: Any) -> None:
    """Of the test, and of trials where accuracy is searched, with the standard error."""
    trials, test = warned(f"{BY_ACCURACY}16; evaluate.limit=4", "over so few")
    assert said("16 questions ... 0.12 ... `search.limit`", trials) and said("4 questions ... 0.25", test)
    assert warned("evaluate.limit=40", "over so few") == []


def test_trials_that_the_controls_use_up_are_a_warning(warned: Any) -> None:
    few = "quantize.group=block; sensitivity.methods=[mutual_information, kl]; search.max_trials="
    assert warned(f"{few}4") == []
    (warning,) = warned(f"{few}3")
    assert said(
        "3 uniform and seed plans ... none of 3 trials ... `search.max_trials` ... `sensitivity.methods`", warning
    )


def test_a_repeated_confirmation_row_is_left_out(inspected: Any, tmp_path: Path) -> None:
    """Every other row chooses the winner: twice in a row, one would choose and judge."""
    texts = [f"{row} and {row}" for row in ("one", "one", "two", "three", "Two!", "one")]
    (tmp_path / "rows.jsonl").write_text(jsonl(*({"text": text} for text in texts)))
    found = inspected({"data.confirmation": [{"source": str(tmp_path / "rows.jsonl"), "format": "text"}]})
    assert [row.response for row in found.examples["confirmation"]] == ["one and one", "two and two", "three and three"]
    assert said("3 rows of `data.confirmation` left out ... 'one and one'", found.warnings[0])


def test_a_question_that_scores_and_chooses_is_a_warning(inspected: Any, demo_tasks: Path) -> None:
    questions = demo_rows("questions_validation.jsonl")[:4]
    questions[3] = questions[0]
    (demo_tasks.parent / "data" / "questions_validation.jsonl").write_text(jsonl(*questions))
    warning = inspected(f"{BY_ACCURACY}2; evaluate.include_path={demo_tasks}").warnings[0]
    asked = normalized(questions[0]["question"])
    assert said(f"`search.tasks` repeat 1 question ... {asked} ... `search.limit`", warning)


# ---- a disk too small


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of one MiB."""
    with disk_of("1m", tmp_path / "disk") as folder:
        yield folder


def test_a_disk_too_small_is_refused(small_disk: Path, tiny_model: Path) -> None:
    # Enough trials that their checkpoints alone do not fit.
    config = config_of("search.max_trials=50", raw_config(tiny_model, small_disk / "run"))
    with pytest.raises(UserError) as caught:
        check(config, lambda event: None)
    assert said(f"`output` ... {small_disk} ... needs about ... make room", str(caught.value))
    amounts = [float(number) for number in re.findall(r"(\d+(?:\.\d+)?) [KMG]i?B", str(caught.value))]
    assert len(amounts) == 2 and all(amounts), "both amounts are told in a unit that shows them"
