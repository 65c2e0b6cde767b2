"""`qpruner generate` gives the same answers as transformers, for the models of a run and of a
folder."""

import functools
import json
import os
import re
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_exports import change_weights
from click.testing import Result
from conftest import command, raw_config
from made_run import STATE
from mixed_models import finished_run
from object_store import object_store, talk_to
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qpruner.cli.flow_verbs import where_next
from qpruner.cli.model_verbs import printable
from qpruner.data.encoding import alpaca_prompt
from qpruner.errors import UserError
from qpruner.export.forms import export
from qpruner.export.generate import Sampling, sources
from qpruner.runs.lock import hold_run
from qpruner.runs.records import PrepareRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import objects, storage_at

PROMPT = "Question: which of these"


def scaled_layers(model: Path, factor: float, folder: Path) -> Path:
    """Copy a model and scale what its blocks add."""
    shutil.copytree(model, folder)
    for part in ("down_proj.weight", "o_proj.weight"):
        change_weights(folder / "model.safetensors", part, lambda weight: weight * factor)
    return folder


@pytest.fixture(scope="module")
def lively(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger block outputs; without them it only repeats the last token."""
    return scaled_layers(tiny_model, 40, tmp_path_factory.mktemp("lively") / "model")


@pytest.fixture(scope="module")
def run(lively: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = finished_run(lively, tmp_path_factory.mktemp("talk") / "run")
    scaled_layers(lively, -0.5, root / "cuts" / "cut-20")
    record = PrepareRecord(
        digest="d", seconds=1.0, model_path=str(lively), converted=False, num_rows={}
    )
    RunDir(root).write_record("prepare", record)
    config = raw_config(lively, root)
    here = {"config": config, "folder": str(lively.parent), "host": socket.gethostname()}
    RunDir(root).write_state(STATE.model_copy(update=here))
    return root


def generate(model: object, *options: object, code: int = 0) -> Result:
    """Ask models for a few tokens by the command line."""
    done = command("generate", model, *options, "--max-tokens", 12)
    assert done.exit_code == code, done.output
    return done


def answers(*options: object) -> dict[str, str]:
    done = generate(*options, "--prompt", PROMPT, "--json")
    return {answer["model"]: answer["text"] for answer in json.loads(done.stdout)["answers"]}


@functools.cache
def plain(folder: Path) -> Any:
    base = folder / "base"
    if not base.is_dir():
        return AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def expected(folder: Path, prompt: str = PROMPT) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    written = plain(folder).generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def test_every_model_of_a_run_answers_as_in_transformers(
    run: Path, lively: Path, tmp_path: Path
) -> None:
    texts = answers(run)
    cut = run / "cuts" / "cut-20"
    assert texts == {
        "base": expected(lively),
        "cut-20": expected(cut),
        "final": expected(run / "final"),
    }
    assert len(set(texts.values())) == 3
    assert list(answers(run, "--which", "final,base")) == ["final", "base"]
    export(RunDir(run), "peft", tmp_path / "peft")
    assert answers(tmp_path / "peft") == {"peft": expected(tmp_path / "peft")}


def test_prompts_are_answered_in_turn(run: Path, lively: Path) -> None:
    """Loading is reported on stderr; stdout has the answers only."""
    prompts = (PROMPT, "Answer: the")
    asked = (run, "--which", "base,final", "--prompt", prompts[0], "--prompt", prompts[1])
    done = generate(*asked)
    lines = []
    for prompt in prompts:
        lines.append(f"> {prompt}\n")
        for name, folder in (("base", lively), ("final", run / "final")):
            lines.append(f"[{name}]\n{printable(expected(folder, prompt))}\n")
    assert done.stdout == "".join(lines)
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["base", "final"]
    answered = json.loads(generate(*asked, "--json").stdout)["answers"]
    order = [(0, "base"), (1, "base"), (0, "final"), (1, "final")]
    assert [(answer["prompt"], answer["model"]) for answer in answered] == order


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("chat", "<user>which\n<assistant>"),
        ("none", "which"),
        ("alpaca", alpaca_prompt("which")),
        ("alpaca_short", "### Instruction:\nwhich\n\n### Response:\n"),
    ],
)
def test_a_chat_template_is_used_where_there_is_one(
    template: str, prompt: str, lively: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(lively, tmp_path / "instruct"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    done = generate(folder, "--prompt", "which", "--template", template, "--json")
    (answer,) = json.loads(done.stdout)["answers"]
    assert answer["text"] == expected(lively, prompt)


def test_a_sampled_answer_depends_on_the_seed_only(lively: Path) -> None:
    [source] = sources(lively, ())
    generator = source.load()
    once, again, other = (
        generator.answer(PROMPT, Sampling(12, 1.0, seed)).text for seed in (1, 1, 2)
    )
    assert once == again
    assert len({expected(lively), once, other}) == 3


def test_an_answer_ends_at_every_end_token_of_the_model(lively: Path, tmp_path: Path) -> None:
    """Both the end token of the tokenizer and another in the model's generation_config.json end an
    answer."""
    folder = Path(shutil.copytree(lively, tmp_path / "ending"))
    third = AutoTokenizer.from_pretrained(folder)(expected(lively))["input_ids"][2]
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [third]}))
    [ending] = sources(folder, ())
    answer = ending.load().answer(PROMPT, Sampling(12, 0.0, 0))
    assert answer.ended == "end"
    assert answer.num_tokens <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x", "--which", "finl"], "did you mean `final`?"),
        (["--prompt", " "], "`--prompt TEXT` is missing or empty"),
        (["--prompt", "word " * 300], "context 256: shorten the prompt"),
    ],
)
def test_wrong_options_are_refused_with_a_remedy(
    run: Path, options: list[str], message: str
) -> None:
    assert message in generate(run, *options, code=2).stderr


def test_missing_or_damaged_models_are_refused(run: Path, lively: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    adapted = Path(shutil.move(copy / "final", tmp_path / "final"))
    assert [source.name for source in sources(copy, ())] == ["base", "cut-20"]
    (adapted / "adapter_model.safetensors").rename(adapted / "adapter_model.bin")
    weights = copy / "cuts" / "cut-20" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for place, which, message in (
        (copy, ["final"], "repeat `qpruner run` to make it, or use `--which base,cut-20`"),
        (copy, [], r"the cut-20 model: weight file \S+ is truncated or damaged"),
        (lively, ["final"], "`--which` selects models of a run"),
        (tmp_path / "nothing", [], "name a run folder or a model folder"),
        (tmp_path, [], r"has no config\.json"),
        (adapted, [], "pickled adapters are not read"),
    ):
        with pytest.raises(UserError, match=message):
            sources(place, which)


@pytest.mark.parametrize("recorded", ["model", "gone/prepare/model", "prepare/model"])
def test_a_copied_run_finds_its_converted_base_model(
    recorded: str, run: Path, lively: Path, tmp_path: Path
) -> None:
    """The recorded path of the original run may be missing, or belong to another run."""
    copy = Path(shutil.copytree(run, tmp_path / "renamed"))
    base = Path(shutil.copytree(lively, copy / "prepare" / "model"))
    path = recorded if recorded.startswith("prepare") else str(lively.parent / recorded)
    record = RunDir(copy).read_record("prepare", PrepareRecord)
    assert record
    changed = record.model_copy(update={"model_path": path, "converted": True})
    RunDir(copy).write_record("prepare", changed)
    assert [source.folder for source in sources(copy, ["base"])] == [base]


def test_a_running_driver_gives_a_warning(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    asked = ("generate", copy, "--prompt", PROMPT, "--max-tokens", 2, "--json")
    warning = f"warning: process {os.getpid()} on {socket.gethostname()} works on {copy}"
    with hold_run(copy, print):
        for arguments in (asked, ("export", copy, "--to", "peft", "--out", tmp_path / "peft")):
            done = command(*arguments)
            assert done.exit_code == 0, done.output
            assert warning in done.stderr
            assert "warning" not in done.stdout
    assert "warning" not in command(*asked).stderr


def test_suggested_commands_for_a_run_at_a_uri_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands are suggested by the last line of `qpruner run` and in errors of verbs that need
    a folder."""
    with object_store() as store:
        talk_to(store, monkeypatch)
        monkeypatch.setenv(objects.CACHE, str(tmp_path / "cache"))
        endpoint = store.environment["AWS_ENDPOINT_URL"]
        there = RunDir(f"{store.uri('run')}?endpoint_override={endpoint}")
        for name in ("final", "prepare/data/confirmation"):
            storage_at(there.root / name).put_folder(run / name)
        suggested = where_next(there.root)
        bring, generate = re.findall("`qpruner ((?:export|generate) [^`]*)`", suggested)
        words = {"FOLDER": tmp_path / "brought", "TEXT": PROMPT}
        for line in (bring, generate):
            done = command(*(words.get(word, word) for word in shlex.split(line)))
            assert done.exit_code == 0, done.output
        assert printable(expected(tmp_path / "brought")).strip() in done.stdout
        address = there.storage.address
        refused = command("generate", address, "--prompt", PROMPT)
        assert refused.exit_code == 2
        assert f"`qpruner {bring}`" in refused.stderr
        with_secret = address.replace("?", "?secret_key=HUSH&")
        assert "HUSH" not in command("generate", with_secret, "--prompt", PROMPT).output


def test_control_characters_are_replaced() -> None:
    assert printable("a\tb\nc\x1b]0;x\x07\x9b1m\r") == "a\tb\nc\ufffd]0;x\ufffd\ufffd1m\ufffd"
