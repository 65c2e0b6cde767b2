"""The model card: hubs read from it what the run knows and what the user states."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Repository, serving
from huggingface_hub import ModelCard
from made_run import MadeRun, results_of, searched_row, snapshot
from plain_transformers import run_python
from safetensors.numpy import save

from qpruner.report.card import model_card
from qpruner.report.files import write_report
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.records import GIVEN
from qpruner.runs.run_dir import RunDir


def card_on(base: str, folder: Path, root: Path, converted: bool = False, **stated: Any) -> Any:
    """Return the card's metadata for a run on `base`, whose files are in `folder` (written by the
    run if `converted`). `stated` are keys of `card`."""
    made = MadeRun(root, num_trials=4, num_blocks=2, model=base)
    train = [{"source": "data/train.jsonl"}, {"source": "yahma/alpaca-cleaned"}]
    config = made.state.config | {
        "data": made.state.config["data"] | {"train": train},
        "card": stated,
    }
    made.change_state(config=config, folder=f"{root.parent}")
    made.change("prepare", model_path=str(folder), converted=converted)
    return ModelCard(model_card(read_snapshot(made.run))).data


def test_the_final_model_gets_a_card_that_the_hub_can_read(tmp_path: Path) -> None:
    root = MadeRun(tmp_path / "run", num_trials=6, num_blocks=2).run.root
    (root / "final").mkdir()
    write_report(RunDir(root))
    card = ModelCard((root / "final" / "README.md").read_text())
    assert card.data.model_name == "run" and card.data.base_model is None, (
        "a local folder is no hub id"
    )
    scored = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    results = json.loads((root / "results.json").read_text())
    (row,) = [
        row
        for row in results["records"]["evaluate"]["rows"]
        if (row["name"], row["seed"]) == ("searched", 0)
    ]
    assert scored == {score["task"]: round(score["value"], 4) for score in row["tasks"]}
    assert results["claim"].splitlines()[0] in card.text and "import qpruner.hf" in card.text


def test_the_card_says_where_the_plan_came_from() -> None:
    for found, title in (
        ({}, "searched"),
        (
            {"origin": "unpruned-knapsack"},
            "winner (not pruned, knapsack)",
        ),
        ({"origin": GIVEN}, "given plan"),
    ):
        card = model_card(snapshot(results_of(searched_row([1.0]), **found)))
        words = f"by a plan from gp, trial 11 (`{title}` below), fine-tuned by qpruner"
        assert f"`me/base`, 20 % pruned, quantized to 6.00 mean bits {words}" in card
        assert "nothing is claimed" in card


def test_a_card_names_the_hub_model_and_data_and_its_licence(tmp_path: Path) -> None:
    """The model comes from a hub on loopback, as `prepare` fetches one."""
    card = "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n# Base\n"
    code = (
        "from pathlib import Path\nfrom qpruner.config.schema import ModelConfig\n"
        "from qpruner.models.checkpoint import prepare_base\n"
        "for name in ('with', 'without'):\n"
        "    print(prepare_base(ModelConfig(source='me/' + name), Path('unused')).path)"
    )
    with serving() as hub:
        files = {"config.json": b"{}", "model.safetensors": save({"weight": np.zeros(1)})}
        hub.repositories["me/without"] = Repository(private=False, files=files)
        hub.repositories["me/with"] = Repository(
            private=False, files=files | {"README.md": card.encode()}
        )
        variables = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        folders = [Path(line) for line in run_python(code, **variables).splitlines()[-2:]]
    found = card_on("me/with", folders[0], tmp_path / "one")
    assert (found.base_model, found.datasets) == ("me/with", ["yahma/alpaca-cleaned"])
    assert (found.license, found.license_name) == ("other", "qwen-research")
    assert found.license_link == "https://huggingface.co/me/with/blob/main/LICENSE"
    found = card_on("me/without", folders[1], tmp_path / "two")
    assert (found.base_model, found.license) == ("me/without", None)


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (b"---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"),
        (b"---\nlicense: [broken\n---\n", None),
        (b"---\n- license\n---\n", None),
        (b"\xff\xfe", None),
    ],
    ids=["whole", "broken", "no-mapping", "no-text"],
)
def test_a_local_models_licence_is_read_where_it_can_be(
    card: bytes, license: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds for a moved run; a folder seen from the command's working folder is no hub
    id."""
    base = tmp_path / "run" / "prepare" / "model"
    base.mkdir(parents=True)
    (base / "README.md").write_bytes(card)
    monkeypatch.chdir(base)
    found = card_on(
        "run/prepare", tmp_path / "gone" / "prepare" / "model", tmp_path / "run", converted=True
    )
    assert (found.license, found.base_model, found.datasets) == (
        license,
        None,
        ["yahma/alpaca-cleaned"],
    )


def test_what_a_user_states_replaces_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: research\n---\n# Base\n"
    )
    found = card_on(
        str(tmp_path),
        tmp_path,
        tmp_path / "one",
        base_model="me/base",
        license="mit",
        datasets=["me/rows"],
    )
    assert (found.base_model, found.license, found.license_name) == ("me/base", "mit", None)
    assert found.datasets == ["me/rows"]
