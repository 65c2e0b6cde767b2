"""`qpruner push` to a local hub server: files, visibility, and what must not be uploaded."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import command
from hub_server import TOKEN, Hub, Repository, serving
from huggingface_hub import constants
from mixed_models import finished_run, logits_of, off_by
from transformers import AutoModelForCausalLM

from qpruner.export.card import loading_section
from qpruner.export.forms import export
from qpruner.runs.records import MARK
from qpruner.runs.run_dir import RunDir

CARD = (
    f"---\nlicense: mit\n---\n\n# mine\n\n{loading_section('packed')}\n## Measured\n\nA note of "
    "its owner.\n"
)
REPO = "someone/mine"


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = finished_run(tiny_model, tmp_path_factory.mktemp("push") / "run")
    (root / "final" / "README.md").write_text(CARD)
    export(RunDir(root), "peft", root / "export" / "peft")
    return root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as served:
        changes = {
            "ENDPOINT": served.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{served.endpoint}/{{repo_id}}/resolve"
            "/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        # transformers (5.24) keeps the endpoint of its first question, an earlier test's, and tries
        # it for 45 s.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield served


def push(run: Path, *options: str, code: int = 0) -> Result:
    done = command("push", run, REPO, *options)
    assert done.exit_code == code, done.output
    return done


def loaded(card: bytes) -> Any:
    [code] = re.findall(r"```python\n(.*?)```", card.decode(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


def test_the_final_model_is_pushed_to_a_private_repository(finished: Path, hub: Hub) -> None:
    done = push(finished, "--json")
    summary = json.loads(done.stdout.splitlines()[-1])
    repository = hub.repositories[REPO]
    files = repository.files
    local = {path.name: path.read_bytes() for path in (finished / "final").iterdir()}
    assert repository.private
    assert summary["is_private"]
    assert summary["num_files"] == len(local)
    assert summary["num_bytes"] == sum(map(len, files.values()))
    assert f"{len(local)} files, {summary['num_bytes'] / 1e6:.1f} MB" in done.stderr
    assert summary["card_lacks"] == ["base_model", "datasets"]
    assert "`card.base_model`, `card.datasets`" in done.stderr
    assert set(files) == set(local)
    changed = {name for name in local if local[name] != files[name]}
    assert changed == {"README.md", "adapter_config.json"}
    assert f'from_pretrained("{REPO}")'.encode() in files["README.md"]
    assert all(str(finished.parent).encode() not in files[name] for name in changed)
    assert TOKEN not in done.output


def test_a_pushed_model_is_loaded_by_its_repository_name(
    finished: Path, hub: Hub, tmp_path: Path
) -> None:
    """Packed layers and the adapter both come from the hub."""
    push(finished)
    of_hub = AutoModelForCausalLM.from_pretrained(REPO, cache_dir=tmp_path)
    here = AutoModelForCausalLM.from_pretrained(finished / "final")
    assert torch.equal(logits_of(of_hub), logits_of(here))


def test_a_merged_model_replaces_the_final_model(run: Path, hub: Hub) -> None:
    """An adapter pushed before is deleted, because transformers would attach it to the merged
    model."""
    refused = push(run, "--what", "merged", code=2)
    assert "has no merged model: run `qpruner export" in refused.stderr
    merged = export(RunDir(run), "merged", run / "export" / "merged").folder
    attributes = b"*.safetensors filter=lfs"
    earlier = {"notes/mine.txt": b"", "adapter_config.json": b"{}"}
    files = earlier | {".gitattributes": attributes}
    hub.repositories[REPO] = Repository(private=True, files=files)
    assert "2 earlier files removed, private" in push(run, "--what", "merged").stdout
    names = {path.name for path in merged.iterdir()} - {MARK}
    assert set(files) == {*names, "README.md", ".gitattributes"}
    card = files["README.md"].decode()
    assert "qpruner" not in card
    assert "A note of its owner." in card
    model = loaded(card.replace(REPO, str(merged)).encode())
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "config.json"])
def test_an_export_of_an_earlier_final_model_is_not_pushed(run: Path, hub: Hub, name: str) -> None:
    """It would get the model card of the current final model."""
    with (run / "final" / name).open("ab") as file:
        file.write(b" ")
    done = push(run, "--what", "peft", code=2)
    assert re.search(r"delete this folder.*`qpruner export \S+run --to peft`", done.stderr)
    assert not hub.repositories


def test_a_peft_export_is_loaded_as_its_card_says(finished: Path, hub: Hub) -> None:
    push(finished, "--what", "peft")
    files = hub.repositories[REPO].files
    assert {"adapter_model.safetensors", "base/config.json", "base/model.safetensors"} <= set(files)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == REPO
    assert all(str(finished.parent).encode() not in content for content in files.values())
    # Activations of 8-bit layers are rounded to integers; one rounded differently changes a logit
    # by 0.08.
    assert off_by(logits_of(loaded(files["README.md"])), finished / "final") < 0.3


def test_a_public_repository_needs_the_public_option(finished: Path, hub: Hub) -> None:
    repository = Repository(private=False)
    hub.repositories[REPO] = repository
    refused = push(finished, code=2).stderr
    assert f"{REPO} exists and is public: give `--public`" in refused
    assert "uploading" not in refused
    assert not repository.files
    assert not hub.objects
    assert push(finished, "--public").stdout.rstrip().endswith("public")
    assert "model.safetensors" in repository.files


@pytest.mark.parametrize(
    ("variable", "value", "code", "message"),
    [
        ("HF_TOKEN", "", 2, "set HF_TOKEN to a token with write"),
        ("HF_TOKEN", "hf_wrong", 1, "check that the token may write"),
        ("ENDPOINT", "http://127.0.0.1:9", 1, "the hub cannot be reached"),
        ("HF_HUB_OFFLINE", True, 2, "HF_HUB_OFFLINE is set"),
    ],
    ids=["no-token", "wrong-token", "no-hub", "offline"],
)
def test_push_errors_name_the_remedy(
    variable: str,
    value: Any,
    code: int,
    message: str,
    finished: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable == "HF_TOKEN":
        monkeypatch.setenv(variable, value)
    else:
        monkeypatch.setattr(constants, variable, value)
    assert message in push(finished, code=code).stderr
    assert not hub.repositories
    assert not hub.objects


def test_a_run_without_final_model_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    assert "has no final model: repeat `qpruner run`" in push(tmp_path, code=2).stderr
