"""A two-layer Llama with its tokenizer, built once a session, and a whole configuration for it."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before any library is imported: no hub, no progress bars.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On a busy machine, threads wait for one another: a 64 x 128 LoftQ start took 290 ms with two, 1.3
# ms with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Instead of two minutes, for full disks on which no test makes room.
os.environ.setdefault("QPRUNER_STORAGE_PATIENCE_SECONDS", "1")
# Ray then treats the cluster as one machine, so that several raylets use loopback addresses.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# Otherwise Ray starts a cluster when it is asked anything, and every later test finds it.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import pytest
import yaml

from qpruner.runs.events import Message

if TYPE_CHECKING:
    from click.testing import Result

# There is no Ray on machines with the kit of benchmarks/gpu_7b.py.
pytest_plugins = ["object_store", *(["searched_runs", "whole_runs"] if find_spec("ray") else [])]
ROOT = Path(__file__).resolve().parent.parent
"""The folder of this checkout."""
DEMO_DATA = files("qpruner") / "demo" / "data"
Raw = dict[str, Any]
"""A configuration or a record as plain data, as YAML and JSON give it."""


def pytest_collection_finish() -> None:
    """Exclude the libraries, which are imported by now, from garbage collection, which takes 0.3 s
    a time with them."""
    gc.collect()
    gc.freeze()


def demo_rows(name: str) -> list[Raw]:
    """Read the rows of a data file of the demo."""
    return [json.loads(line) for line in (DEMO_DATA / name).read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama (2 key/value heads, 4 query heads, 256 channels) and a
    byte-level BPE."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    bpe = ByteLevelBPETokenizer()
    texts = [
        f"Question: {row['question']}\nAnswer: {' '.join(row['choices']['text'])}"
        for row in demo_rows("questions_train.jsonl")
    ]
    bpe.train_from_iterator(
        texts, vocab_size=512, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
    }
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = LlamaConfig(**sizes, **heads, **tokens, tie_word_embeddings=True, dtype="bfloat16")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def fresh(tiny_model: Path) -> Callable[..., Any]:
    """Return a function that builds the same unquantized model with plain adapters each time."""
    from qpruner.config.schema import LoraConfig
    from qpruner.quantization.assembly import assemble, attach_adapters
    from qpruner.quantization.bank import BankSource

    def build(dtype: str = "bfloat16", dropout: float = 0.0) -> Any:
        lora = LoraConfig(rank=4, dropout=dropout, init="plain")
        bank = BankSource(tiny_model, tiny_model, "block", dtype, lora, seed=3)
        model, starts = assemble(bank, {"layers.0": "bf16", "layers.1": "bf16"})
        return attach_adapters(model, starts, lora, "block", seed=3)

    return build


@pytest.fixture(scope="session")
def rows(tiny_model: Path) -> list[dict[str, list[int]]]:
    """The first 24 questions of the demo, encoded."""
    from qpruner.data.encoding import encode
    from qpruner.data.sources import Example
    from qpruner.models.loading import load_tokenizer

    questions = demo_rows("questions_train.jsonl")[:24]
    examples = [
        Example("multiple_choice", row["question"], "", row["choices"]["text"][0])
        for row in questions
    ]
    return encode(examples, load_tokenizer(str(tiny_model)), 64)


def raw_config(model: Path, output: Path) -> Raw:
    """Make a small but complete configuration as plain data."""
    source = "package:qpruner/demo/data"
    return {
        "output": str(output),
        "model": {"source": str(model)},
        "data": {
            **{
                name: [
                    {
                        "source": f"{source}/questions_{name}.jsonl",
                        "format": "multiple_choice",
                        "limit": limit,
                    }
                ]
                for name, limit in {"train": 48, "validation": 16, "confirmation": 16}.items()
            },
            "max_length": 64,
        },
        "calibration": {"num_samples": 8, "num_sensitivity_samples": 32},
        "prune": {"rate": 0.2},
        "sensitivity": {"max_positions": 64, "num_shuffles": 2},
        "quantize": {"group": "projection", "bits": [4, 8], "budget": {"fraction": 0.5}},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"learning_rate": 0.001, "batch_size": 4, "micro_batch_size": 4},
        "search": {"max_trials": 5, "steps": 4, "first_rung": 1, "confirm": 2, "confirm_seeds": 0},
        "finetune": {"steps": 4, "compare": True},
        "evaluate": {
            "tasks": ["qpruner_everyday_test"],
            "include_path": "package:qpruner/demo/tasks",
            "limit": 8,
            "batch_size": 8,
        },
    }


def _mount(option: str, folder: Path) -> None:
    """Mount a file system in memory on a folder; skip the test if that is not permitted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", option, "qpruner-test", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")


@contextmanager
def disk_of(size: str, folder: Path) -> Iterator[Path]:
    """Mount a real file system of some size, such as `16m`, on a new folder."""
    folder.mkdir()
    _mount(f"size={size}", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 48 MiB."""
    with disk_of("48m", tmp_path / "disk") as folder:
        yield folder


@contextmanager
def away(disk: Path) -> Iterator[Callable[[], None]]:
    """Hide a folder behind an empty read-only file system, until the yielded function is called."""
    _mount("ro", disk)
    yield lambda: subprocess.run(["umount", disk], check=True) and None


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a file system except for some bytes; return the file that takes the room."""
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - leave))
    return filler


@contextmanager
def full(disk: Path) -> Iterator[Callable[[], None]]:
    """Fill a file system completely, until the yielded function is called."""
    filler = fill(disk)
    yield filler.unlink
    filler.unlink(missing_ok=True)


@contextmanager
def full_until_noticed(disk: Path, leave: int = 0) -> Iterator[Path]:
    """Fill a file system except for some bytes, until qpruner waits for room; yield the file that
    takes the room."""

    class MakeRoom(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "trying again" in record.getMessage():
                filler.unlink(missing_ok=True)

    filler = fill(disk, leave)
    logger = logging.getLogger("qpruner.runs.storage.retry")
    handler = MakeRoom()
    logger.addHandler(handler)
    try:
        yield filler
    finally:
        logger.removeHandler(handler)


def flip_a_byte(path: Path) -> None:
    """Damage a file as a disk may: its size stays, and safetensors still reads it."""
    data = bytearray(path.read_bytes())
    data[-min(100, len(data))] ^= 0x10
    path.write_bytes(data)


def flipped(text: bytes, before: bytes) -> bytes:
    """Flip the lowest bit of the byte after some text, which turns a digit into another digit."""
    at = text.index(before) + len(before)
    return text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]


def command(*arguments: object) -> Result:
    """Run `qpruner` in this process."""
    from click.testing import CliRunner

    from qpruner.cli.main import main

    try:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])
    finally:
        logging.captureWarnings(False)


def run_program(
    *command: object,
    code: int | None = 0,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    text: str | None = None,
    minutes: float = 2,
) -> subprocess.CompletedProcess[str]:
    """Run a program with some text as its input.

    It must end with the exit code `code`, unless that is None.
    """
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=60 * minutes,
    )
    assert code in (None, done.returncode), (
        f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def ignore(event: object) -> None:
    """Ignore an event."""


def texts(events: Iterable[object]) -> list[str]:
    """List the texts of the messages among some events."""
    return [event.text for event in events if isinstance(event, Message)]


def events_of(events: Iterable[Any], kind: type[Any], stage: str) -> list[Any]:
    """List the events of a kind that a stage emitted."""
    return [event for event in events if isinstance(event, kind) and event.stage == stage]


def with_key(raw: Raw, key: str, value: Any) -> Raw:
    """Return a copy of a configuration with `section.key` set."""
    changed = copy.deepcopy(raw)
    here = changed
    *sections, last = key.split(".")
    for section in sections:
        here = here[int(section)] if isinstance(here, list) else here.setdefault(section, {})
    if isinstance(here, list):
        here[int(last)] = value
    else:
        here[last] = value
    return changed


def with_keys(raw: Raw, **keys: Any) -> Raw:
    """Return a copy of a configuration with keys set as `section__key=value`."""
    for key, value in keys.items():
        raw = with_key(raw, key.replace("__", "."), value)
    return raw


def changed_by(change: str, raw: Raw) -> Raw:
    """Return a copy of a configuration with keys set as `key=value; key=value`, values in YAML."""
    for part in change.split("; "):
        key, _, value = part.partition("=")
        raw = with_key(raw, key, yaml.safe_load(value))
    return raw


def said(message: str, text: str) -> bool:
    """Return True if a text has all parts of a message, which ` ... ` separates."""
    return all(part in text for part in message.split(" ... "))


def assert_has(record: object, **expected: object) -> None:
    """Compare some fields of a record, or some keys of a mapping, with what they should be."""
    read = record.get if isinstance(record, dict) else partial(getattr, record)
    assert {name: read(name) for name in expected} == expected


def winner_in(record: Raw) -> Raw:
    """Return the winning plan's fine-tune as a trial, from the JSON of a search's record."""
    [winner] = [
        finalist for finalist in record["finalists"] if finalist["index"] == record["best_index"]
    ]
    of_trial: Raw = winner["fine_tunes"][0]
    return of_trial


@pytest.fixture
def tiny_raw(tiny_model: Path, tmp_path: Path) -> Raw:
    return raw_config(tiny_model, tmp_path / "run")


@pytest.fixture
def write_yaml(tmp_path: Path) -> Callable[[Raw], Path]:
    """Return a function that writes a configuration to a YAML file."""

    def write(raw: Raw) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write
