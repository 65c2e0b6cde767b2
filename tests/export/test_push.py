"""`qpruner push` against a hub on loopback: what it has afterwards, who may see it, and what it never gets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub, Repository, serving
from mixed_models import finished_run
from transformers import AutoModelForCausalLM

import qpruner.export.hub
import qpruner.hf
from qpruner.errors import UserError
from qpruner.export.card import loading_section
from qpruner.export.forms import export
from qpruner.runs.records import MARK
from qpruner.runs.run_dir import RunDir

CARD = f"""---
license: mit
---

# mine

{loading_section("packed")}
## Measured

A note of its owner.
"""
REPO = "someone/mine"


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a final model and its card."""
    root = finished_run(tiny_model, tmp_path_factory.mktemp("push") / "run")
    (root / "final" / "README.md").write_text(CARD)
    return root


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


def environment(hub: Hub, home: Path, **others: str) -> dict[str, str]:
    """Of who has a token, and no hub but this one."""
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **ours, "HF_HUB_DISABLE_XET": "1", **others}


def push(run: Path, variables: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qpruner", "push", str(run), REPO, *options]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def snippets(card: bytes) -> list[str]:
    """The Python of a card."""
    return re.findall(r"```python\n(.*?)```", card.decode(), re.DOTALL)


def test_the_hub_has_the_final_model_and_nobody_else_sees_it(run: Path, hub: Hub, tmp_path: Path) -> None:
    variables = environment(hub, tmp_path)
    done = push(run, variables, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    repository = hub.repositories[REPO]
    assert repository.private and told["is_private"]
    size = f"{told['num_bytes'] / 1e6:.1f} MB"
    assert f"[push] {told['num_files']} files, {size}, on their way to {REPO} ...\n" in done.stderr
    assert told["num_bytes"] == sum(map(len, repository.files.values()))
    assert told["card_lacks"] == ["base_model", "datasets"]
    assert "does not state: base model, datasets; set `card.base_model`, `card.datasets` and repeat" in done.stderr
    local = {path.name: path.read_bytes() for path in (run / "final").iterdir()}
    assert set(repository.files) == set(local) and told["num_files"] == len(local)
    changed = {name for name in local if local[name] != repository.files[name]}
    assert changed == {"README.md", "adapter_config.json"}
    assert f'from_pretrained("{REPO}")' in repository.files["README.md"].decode()
    assert str(run.parent) not in "".join(repository.files[name].decode() for name in changed)
    assert TOKEN not in done.stdout + done.stderr

    # By its name, as anybody loads it who may: packed layers and the adapter both come from the hub.
    load = (
        "import sys, torch, qpruner.hf\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({REPO!r})\n"
        f"torch.save(model(torch.tensor([{list(range(5, 29))}])).logits, sys.argv[1])\n"
    )
    logits = tmp_path / "logits.pt"
    loaded = subprocess.run([sys.executable, "-c", load, logits], env=variables, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    import torch

    expected = AutoModelForCausalLM.from_pretrained(run / "final")(torch.tensor([list(range(5, 29))])).logits
    assert torch.equal(torch.load(logits, weights_only=True), expected)


def test_a_merged_model_takes_the_place_of_the_final_one(run: Path, hub: Hub, tmp_path: Path) -> None:
    """In one repository: transformers would attach an adapter that was pushed before to what has it merged in."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    merged = export(RunDir(run), "merged", run / "export" / "merged").folder
    files = {".gitattributes": b"*.safetensors filter=lfs", "notes/mine.txt": b"", "adapter_config.json": b"{}"}
    hub.repositories[REPO] = Repository(private=True, files=files)
    done = push(run, environment(hub, tmp_path), "--what", "merged")
    assert done.returncode == 0, done.stderr
    assert "MB, 2 earlier files removed, private" in done.stdout
    names = {path.name for path in merged.iterdir()} - {MARK}
    assert set(files) == {*names, "README.md", ".gitattributes"}

    card = files["README.md"].decode()
    assert "qpruner" not in card and "A note of its owner." in card
    told: dict[str, Any] = {}
    [code] = snippets(files["README.md"])
    exec(code.replace(REPO, str(merged)), told)
    assert not [name for name, _ in told["model"].named_parameters() if "lora" in name]


def test_an_export_of_an_earlier_final_model_is_not_pushed(run: Path, tmp_path: Path) -> None:
    """Under the card of the present one."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    export(RunDir(run), "peft", run / "export" / "peft")
    for name in ("adapter_model.safetensors", "config.json"):
        before = (run / "final" / name).read_bytes()
        (run / "final" / name).write_bytes(before + b" ")
        with pytest.raises(UserError, match=r"delete it, then repeat `qpruner export \S+run --to peft`"):
            qpruner.export.hub.push(RunDir(run), REPO, "peft", is_public=False)
        (run / "final" / name).write_bytes(before)
    with pytest.raises(UserError, match="no token"):
        qpruner.export.hub.push(RunDir(run), REPO, "peft", is_public=False)


@pytest.mark.slow
def test_a_peft_export_is_loaded_as_its_card_says(run: Path, hub: Hub, tmp_path: Path) -> None:
    import torch

    export(RunDir(run), "peft", run / "export" / "peft")
    variables = environment(hub, tmp_path)
    done = push(run, variables, "--what", "peft")
    assert done.returncode == 0, done.stderr
    files = hub.repositories[REPO].files
    assert {"adapter_config.json", "adapter_model.safetensors", "base/config.json", "base/model.safetensors"} <= set(
        files
    )
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == REPO
    assert not [name for name, content in files.items() if str(run.parent).encode() in content]

    [card] = snippets(files["README.md"])
    predict = f"import sys, torch\ntorch.save(model(torch.tensor([{list(range(5, 29))}])).logits, sys.argv[1])\n"
    code, logits = f"{card}\n{predict}", tmp_path / "logits.pt"
    loaded = subprocess.run([sys.executable, "-c", code, logits], env=variables, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    model, ids = AutoModelForCausalLM.from_pretrained(run / "final"), torch.tensor([list(range(5, 29))])
    expected = model(ids).logits.float()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    # Activations of 8-bit layers are rounded to integers: where one falls the other way, a logit moves by 0.08.
    difference = torch.load(logits, weights_only=True).float() - expected
    assert difference.norm() < 0.3 * (model(ids).logits.float() - expected).norm()


def test_what_is_public_takes_nothing_private(run: Path, hub: Hub, tmp_path: Path) -> None:
    hub.repositories[REPO] = Repository(private=False)
    refused = push(run, environment(hub, tmp_path))
    assert "on their way" not in refused.stderr
    assert refused.returncode == 2 and f"{REPO} is there and public: give `--public`" in refused.stderr
    assert not hub.repositories[REPO].files and not hub.objects
    done = push(run, environment(hub, tmp_path), "--public")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("public") and "model.safetensors" in hub.repositories[REPO].files


@pytest.mark.parametrize(
    ("variables", "code", "told"),
    [
        ({"HF_TOKEN": ""}, 2, "set HF_TOKEN to one that may write"),
        ({"HF_TOKEN": "hf_wrong"}, 1, "see that the token may write there"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "the hub cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE forbids"),
    ],
    ids=["no-token", "wrong-token", "no-hub", "offline"],
)
def test_what_is_in_the_way(
    variables: dict[str, str], code: int, told: str, run: Path, hub: Hub, tmp_path: Path
) -> None:
    done = push(run, environment(hub, tmp_path, **variables))
    assert (done.returncode, told in done.stderr) == (code, True), done.stderr
    assert not hub.repositories and not hub.objects


def test_there_has_to_be_something_to_push(run: Path, hub: Hub, tmp_path: Path) -> None:
    done = push(run, environment(hub, tmp_path), "--what", "merged")
    assert done.returncode == 2 and "has no merged model: `qpruner export" in done.stderr
    done = push(tmp_path, environment(hub, tmp_path))
    assert done.returncode == 2 and "has no final model: repeat `qpruner run`" in done.stderr
