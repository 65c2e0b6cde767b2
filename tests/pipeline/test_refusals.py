"""Bad models, rows and tasks, one a row: each is refused, or warned about, before a weight is
loaded.

A row has a change of a valid configuration and the parts of the message: key, value, rule and
remedy. Errors that the configuration alone causes: `tests/config/test_bad_input.py`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DEMO_DATA, changed_by, said, with_key, with_keys

from qpruner.config.load import validate_config
from qpruner.config.schema import DataSource, RunConfig
from qpruner.data.sources import load_examples
from qpruner.errors import ConfigError, UserError
from qpruner.models.families import families
from qpruner.pipeline.preflight import Inspection, inspect
from qpruner.pipeline.preflight_rows import num_cut

QUESTIONS = "package:qpruner/demo/data/questions_{}.jsonl"
TEST_TASK = "qpruner_everyday_test"
SEARCH_TASK = "qpruner_everyday_validation"
BY_ACCURACY = f"search.metric=accuracy; search.tasks=[{SEARCH_TASK}]; search.limit="


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if weights are loaded before an input is refused."""
    from transformers import PreTrainedModel

    def refuse(*args: object, **options: object) -> None:
        pytest.fail("weights were loaded before the input was refused")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


@pytest.fixture
def inspected(tiny_raw: dict[str, Any]) -> Callable[[str | dict[str, Any]], Inspection]:
    """Return a function that inspects the configuration with some keys changed."""
    return lambda change: inspect(config_of(change, tiny_raw))


def config_of(change: str | dict[str, Any], raw: dict[str, Any]) -> RunConfig:
    if isinstance(change, str):
        return validate_config(changed_by(change, raw) if change else raw)
    return validate_config(with_keys(raw, **change))


def refused_with(message: str, change: str | dict[str, Any], raw: dict[str, Any]) -> None:
    """Check that a change is refused with all parts of the message, and that nothing is left
    behind."""
    with pytest.raises(UserError) as caught:
        inspect(config_of(change, raw))
    assert caught.value.exit_code == 2
    assert said(message, str(caught.value)), str(caught.value)
    assert not Path(raw["output"]).exists(), "a refusal leaves nothing behind"


def test_the_configuration_that_the_rows_spoil_is_accepted(inspected: Any, tmp_path: Path) -> None:
    assert inspected("").shapes.budget_bytes > 0
    assert not (tmp_path / "run").exists(), "inspecting leaves nothing behind"


# ---- what cannot be for this model, budget or device

MODEL = [
    (
        "prune.rate=0.6; prune.first_layer=1",
        "`prune.rate` ... 0.6 ... at least one unit ... lower the rate, allow",
    ),
    ("prune.last_layer=7", "`prune.last_layer` 7 ... within the model's 2 blocks ... 0 to 1"),
    (
        "prune={layer_rate: 0.2, round_to: 320}",
        "`prune.round_to` ... got 320 ... `prune.layer_rate`: 0.2",
    ),
    (
        "quantize.budget={bytes: 1000}",
        "`quantize.budget.bytes` is below ... smallest format, nf4 ... GiB), got 1000",
    ),
    (
        "quantize.budget={mean_bits: 9}",
        "`quantize.budget.mean_bits` must be between the bits of ... 4 and 8, got 9",
    ),
    ("output=TMP/empty.jsonl", "`output` ... empty.jsonl ... is a file ... name"),
    ("output=TMP/empty.jsonl/run", "`output` ... empty.jsonl ... is a file ... name"),
]
ON_CPU = [
    (
        "prune.round_to=32; quantize.bits=[4]",
        "`quantize.formats`: group layers.0.down takes none of nf4 ... "
        "160 columns ... int8 ... round_to",
    ),
    ("model.dtype=float16", "`model.dtype`: float16 cannot be trained on a CPU; use bfloat16"),
]
MODEL += [] if torch.cuda.is_available() else ON_CPU
SOURCES = [
    ("TMP/none", "TMP/none ... does not exist ... name a model folder"),
    (
        "nobody/no-such-model",
        "no model config can be read from 'nobody/no-such-model' ... check that the hub has",
    ),
    ("runs/mine/prune", "CWD/runs/mine/prune ... is no hub id ... name a model folder"),
    ("../mine", "CWD/../mine ... does not exist ... name a model folder"),
    ("~/no-such-model", "HOME/no-such-model ... does not exist ... name a model folder"),
    ("TMP/empty.jsonl", "TMP/empty.jsonl ... is a file ... name a model folder"),
    (
        "package:no_such_package/model.gguf",
        "package `no_such_package` ... not installed ... install it",
    ),
    ("package:qpruner/demo/model.gguf", "package `qpruner` has no file `demo/model.gguf` ... name"),
    ("TMP/none.gguf", "TMP/none.gguf ... does not exist ... name"),
    ("TMP/text.gguf", "TMP/text.gguf ... not a GGUF file"),
]
SOURCES = [
    (f"model.source={source}", f"`model.source` ... {message}") for source, message in SOURCES
]


def _config_keys(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _second_shard_missing(folder: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    second = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / first)
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": first, "model.embed_tokens.weight": second},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_not_json(folder: Path) -> None:
    # else no index is read
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"wei')


def _gpt2(folder: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=300, bos_token_id=0, eos_token_id=1
    ).save_pretrained(folder)


SPOILT: list[tuple[Callable[[Path], object], str, str]] = [
    (
        lambda folder: (folder / "config.json").unlink(),
        "",
        "no config.json ... name a model folder",
    ),
    (
        lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
        "",
        "not a valid JSON file",
    ),
    (
        lambda folder: _config_keys(folder, num_attention_heads=3),
        "",
        "not a multiple of the number of attention heads",
    ),
    (_pickled_only, "", "pickled .bin weights are not read ... save_pretrained"),
    (_second_shard_missing, "", "model-00002-of-00002.safetensors ... lacks ... fetch"),
    (_index_not_json, "", "model.safetensors.index.json ... not valid JSON ... fetch"),
    (
        lambda folder: os.truncate(folder / "model.safetensors", 20_000),
        "",
        "model.safetensors ... truncated ... fetch",
    ),
    (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "", "tokenizer"),
    (
        lambda folder: _config_keys(folder, quantization_config={"bits": 4}),
        "",
        "already quantized ... full-precision",
    ),
    (_gpt2, "", f"`gpt2` ... not supported ... supported: {', '.join(families())}"),
]


@pytest.mark.parametrize(("spoil", "change", "message"), SPOILT, ids=range(len(SPOILT)))
def test_a_spoilt_model_folder_is_refused(
    spoil: Callable[[Path], object],
    change: str,
    message: str,
    tiny_raw: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(tiny_raw["model"]["source"], tmp_path / "model"))
    spoil(folder)
    raw = with_key(tiny_raw, "model.source", str(folder))
    refused_with(message if change else f"`model.source` ... {message}", change, raw)


def test_a_truncated_gguf_file_is_refused(tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    path = tmp_path / "part.gguf"
    writer = GGUFWriter(path, "llama")
    for name, count in (
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 64),
        ("head_count", 2),
    ):
        getattr(writer, f"add_{name}")(count)
    writer.add_feed_forward_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(100)
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for size in (-5000, 100):  # weights, and header
        path.write_bytes(path.read_bytes()[:size])
        refused_with(
            f"`model.source` ... {path} ... truncated ... fetch",
            {"model.source": str(path)},
            tiny_raw,
        )


# ---- what is wrong with rows and tasks


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES = {
    "empty.jsonl": "",
    "text.gguf": "hello world",
    "text.txt": "\n\n\n\n".join(f"Paragraph {number} of a text." for number in range(3)) + "\n",
}
TEXT = "[{source: TMP/text.txt, format: text}]"
ROWS = [
    (
        "data.train.0.source=/no/such.jsonl",
        "`data.train.0.source` ... /no/such.jsonl ... does not exist ... name",
    ),
    (
        "data.train.0.source=TMP/empty.jsonl",
        "`data.train.0.source` ... TMP/empty.jsonl ... empty ... name another",
    ),
    (
        "data.train.0.columns={quetsion: x}",
        "`data.train.0.columns` ... quetsion ... knows the keys question, choices",
    ),
    (
        "data.train.0.columns={question: [question, topic]}",
        "`data.train.0.columns.question` ... one column",
    ),
    (
        "data.train.0.columns={choices: question}",
        "`data.train.0.columns.choices` ... question ... list",
    ),
    ("data.max_length=8", "`data.max_length` ... 8 ... no labelled token in any row ... raise it"),
    (
        "data.confirmation.0.limit=1",
        "`data.confirmation` must have at least 2 different ... got 1 ... raise",
    ),
    (
        "data.template=chat; data.train.0={source: package:qpruner/demo/data/instructions.jsonl}",
        "`data.template: chat` ... needs a tokenizer with a chat template ... set `alpaca`",
    ),
]
CALIBRATION = [
    (
        "num_sensitivity_samples=64",
        "`calibration.num_sensitivity_samples` ... 64 ... only 48 ... ask for fewer",
    ),
    (
        "num_samples=64; calibration.packing=false",
        "`calibration.num_samples` ... 64 samples ... give only 48",
    ),
    (
        "num_samples=4000",
        "`calibration.num_samples` ... 4000 samples of 128 tokens ... `calibration.packing",
    ),
    (
        "max_length=1000000",
        "`calibration.num_samples` ... 8 samples of 1000000 tokens ... make `cali",
    ),
    (
        f"data={TEXT}; calibration.packing=false",
        "`calibration.num_samples` ... 8 ... give only 3 ... ask for fewer",
    ),
]
UNKNOWN = f"has no task `qpruner_everyday_tset` ... did you mean {TEST_TASK}"
TASKS = [
    ("evaluate.tasks=[qpruner_everyday_tset]", f"`evaluate.tasks` ... {UNKNOWN}"),
    ("search.tasks=[qpruner_everyday_tset]", f"`search.tasks` ... {UNKNOWN}"),
    (
        f"{BY_ACCURACY}8; search.metric=acc_norm",
        f"`search.metric` ... acc_norm, but `{SEARCH_TASK}` ... or `accuracy`",
    ),
    (
        f"{BY_ACCURACY}61",
        "`search.limit` ... at most half of the questions ... 120, got 61 ... lower it to 60",
    ),
    (
        "evaluate.include_path=/no/tasks",
        "`evaluate.include_path` ... /no/tasks ... does not exist ... name",
    ),
    (
        "evaluate.include_path=package:qpruner/demo/__init__.py",
        "`evaluate.include_path` ... is a file ... name",
    ),
]
DATA = [*ROWS, *((f"calibration.{change}", message) for change, message in CALIBRATION), *TASKS]
OVERLAPS = [
    ("data.validation.0.source", "train", "`data.train` ... `data.validation` share 16"),
    (
        "data.confirmation.0.source",
        "validation",
        "`data.validation` ... `data.confirmation` share 16",
    ),
    ("data.train.0.source", "test", "`data.train` ... `evaluate.tasks` share 8"),
    ("calibration.data", "test", "`calibration.data` ... `evaluate.tasks`"),
    ("evaluate.text", "confirmation", "`data.confirmation` ... `evaluate.text` share"),
]


def filled(text: str, folder: Path) -> str:
    return (
        text.replace("TMP", str(folder))
        .replace("CWD", str(Path.cwd()))
        .replace("HOME", str(Path.home()))
    )


@pytest.mark.parametrize(("change", "message"), [*MODEL, *SOURCES, *DATA])
def test_bad_input_is_refused(
    change: str, message: str, tiny_raw: dict[str, Any], tmp_path: Path
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    refused_with(filled(message, tmp_path), filled(change, tmp_path), tiny_raw)


@pytest.mark.parametrize(("key", "split", "message"), OVERLAPS)
def test_rows_of_two_uses_must_not_overlap(
    key: str, split: str, message: str, tiny_raw: dict[str, Any]
) -> None:
    source = QUESTIONS.format(split)
    rows = [{"source": source, "format": "multiple_choice"}]
    text = [{"source": source, "format": "text", "columns": {"text": "question"}}]
    value: Any = {"calibration.data": rows, "evaluate.text": text}.get(key, source)
    refused_with(f"{message} ... must not overlap ... select other rows", {key: value}, tiny_raw)


@pytest.fixture
def demo_tasks(tmp_path: Path) -> Path:
    """A copy of the tasks and rows of the demo."""
    return Path(shutil.copytree(DEMO_DATA.parent, tmp_path / "demo")) / "tasks"


def test_a_search_task_of_the_test_s_questions_is_refused(
    demo_tasks: Path, tiny_raw: dict[str, Any]
) -> None:
    text = (demo_tasks / f"{TEST_TASK}.yaml").read_text()
    (demo_tasks / "copy.yaml").write_text(text.replace(f"task: {TEST_TASK}", "task: copy_of_test"))
    change = {"search.tasks": ["copy_of_test"], "evaluate.include_path": str(demo_tasks)}
    refused_with("`search.tasks` ... `evaluate.tasks` ... must not overlap", change, tiny_raw)


@pytest.mark.parametrize("section", ["search", "evaluate"])
def test_a_task_without_accuracy_is_refused(
    section: str, demo_tasks: Path, tiny_raw: dict[str, Any]
) -> None:
    text = (
        (demo_tasks / f"{SEARCH_TASK}.yaml")
        .read_text()
        .replace(f"task: {SEARCH_TASK}", "task: likelihood")
    )
    task = yaml.load(text.replace("!function rows.load", "FUNCTION"), yaml.SafeLoader)
    task |= {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{question}}",
        "doc_to_text": "",
    }
    task["metric_list"] = [{"metric": "bits_per_byte"}]
    del task["doc_to_choice"]
    (demo_tasks / "likelihood.yaml").write_text(
        yaml.safe_dump(task).replace("FUNCTION", "!function rows.load")
    )
    change = {f"{section}.tasks": ["likelihood"], "evaluate.include_path": str(demo_tasks)}
    message = (
        "one of acc_norm, acc, exact_match, but reports bits_per_byte ... "
        "name a task that reports an accuracy"
    )
    refused_with(f"`{section}.tasks` ... {message}", change, tiny_raw)


def test_a_task_s_rows_that_are_no_json_are_refused(
    tiny_raw: dict[str, Any], tmp_path: Path
) -> None:
    """The error of the JSON reader is shown, not only that the data set could not be made."""
    (tmp_path / "questions.jsonl").write_text('{"question": "a"}\n{"question": }\n')
    task = {
        "task": "mine",
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
    }
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "questions.jsonl")}}
    task |= {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task | {"metric_list": [{"metric": "acc"}]}))
    change = {"evaluate.include_path": str(tmp_path), "evaluate.tasks": ["mine"]}
    refused_with("rows of mine cannot be loaded: JSON parse error", change, tiny_raw)


def test_model_rows_and_tasks_are_refused_at_once(tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    """A user should not have to repeat the command for each problem."""
    (tmp_path / "bare.jsonl").write_text('{"x": 1}\n')
    change = {
        "model.source": "/no/model",
        "data.train": [{"source": "/no/rows.jsonl"}, {"source": str(tmp_path / "bare.jsonl")}],
        "data.confirmation": [{"source": "/no/others.jsonl"}],
        "evaluate.tasks": ["no_such_task"],
    }
    with pytest.raises(ConfigError) as caught:
        inspect(config_of(change, tiny_raw))
    told = (
        "/no/model",
        "/no/rows.jsonl",
        "`data.train.1.columns",
        "/no/others.jsonl",
        "`no_such_task`",
    )
    assert len(caught.value.problems) == len(told), caught.value.problems
    assert all(part in problem for part, problem in zip(told, caught.value.problems, strict=True))


# ---- warnings


@pytest.fixture
def warned(inspected: Any) -> Callable[[str | dict[str, Any], str], list[str]]:
    """Return the warnings of a changed configuration that contain some words."""
    return lambda change, words: [
        warning for warning in inspected(change).warnings if words in warning
    ]


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ("", "tokens of 16 rows", "`data.validation` ... tokens of 16 rows ... least 500 tokens"),
        (
            "",
            "tokens of 8 rows",
            "half of `data.confirmation` chooses the winner ... least 500 tokens",
        ),
        (
            "quantize.group=block; sensitivity.methods=[mutual_information, kl]; "
            "search.max_trials=3",
            "`search.max_trials`",
            "up to 5 plans to beat ... none of 3 trials ... allow more",
        ),
    ],
)
def test_too_little_to_tell_plans_apart_is_a_warning(
    change: str, words: str, message: str, warned: Any
) -> None:
    (warning,) = warned(change, words)
    assert said(message, warning), warning


def test_a_budget_that_holds_every_plan_is_a_warning(warned: Any) -> None:
    (warning,) = warned("quantize.budget={bytes: 1_000_000_000}", "`quantize.budget`")
    assert said("every plan fits, as the largest takes ... MB: ask for fewer bytes", warning), (
        warning
    )
    assert warned("", "`quantize.budget`") == []


def test_enough_to_tell_plans_apart_is_no_warning(warned: Any) -> None:
    assert warned(f"{BY_ACCURACY}8", "tokens of") == []
    enough = (
        "quantize.group=block; sensitivity.methods=[mutual_information, kl]; search.max_trials=7"
    )
    assert warned(enough, "`search.max_trials`") == []


def test_rows_without_a_response_are_a_warning(warned: Any, tmp_path: Path) -> None:
    """The response is an empty cell, or missing."""
    rows = [{"instruction": f"Say {number}.", "output": "word " * 300} for number in range(40)]
    rows[3] = {"instruction": "Explain tea.", "output": " "}
    rows[7] = {"instruction": "Explain salt."}
    (tmp_path / "rows.jsonl").write_text(jsonl(*rows))
    source = f"{tmp_path}/rows.jsonl"
    [empty] = warned({"data.train": [{"source": source}], "data.max_length": 256}, "`data.train`")
    assert said("2 rows of `data.train` of 40 ... 'Explain tea.' ... remove the rows", empty)
    assert num_cut(load_examples([DataSource(source=source)], "data.train"), 256) == 38, (
        "as `check` tells"
    )


def test_a_repeated_confirmation_row_is_skipped(inspected: Any, tmp_path: Path) -> None:
    """Otherwise the same row could choose the winner and judge it."""
    texts = [f"{row} and {row}" for row in ("one", "one", "two", "three", "Two!", "one")]
    (tmp_path / "rows.jsonl").write_text(jsonl(*({"text": text} for text in texts)))
    found = inspected(
        {"data.confirmation": [{"source": str(tmp_path / "rows.jsonl"), "format": "text"}]}
    )
    assert [row.response for row in found.rows.examples["confirmation"]] == [
        "one and one",
        "two and two",
        "three and three",
    ]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named(tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    """As in a container whose HOME is read-only; in /proc not even root can create folders."""
    (config := tmp_path / "small.yaml").write_text(yaml.safe_dump(tiny_raw))
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))
    }
    command = [sys.executable, "-m", "qpruner", "run", str(config)]
    done = subprocess.run(
        command, env=kept | {"HOME": "/proc/nohome"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert re.search(
        r"cache of Hugging Face libraries, /proc/nohome.* set the .* HF_HOME to",
        done.stderr,
        re.DOTALL,
    )
