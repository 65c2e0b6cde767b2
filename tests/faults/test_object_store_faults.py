"""Faults of runs at a URI: a killed driver, an empty machine, damaged objects, a server that does
not answer.

The S3 server is a real one on loopback. The results are compared with those of an undisturbed run
in a folder.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import Raw, assert_has, run_program, with_key
from object_store import Gate, Store, talk_to
from real_driver import driver, ended
from whole_runs import comparable, kill_when, outcome, said, written_config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def machine(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs on a machine without local copies."""
    talk_to(store, monkeypatch)
    monkeypatch.setenv("QPRUNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Raw:
    """The outcome of an undisturbed run in a folder."""
    folder = tmp_path_factory.mktemp("undisturbed") / "a"
    config = config_at(str(folder / "run"), folder, tiny_model)
    said(config)
    return outcome(config.parent / "run")


def config_at(output: str, folder: Path, model: Path) -> Path:
    """Write a configuration whose final table has only the base model, the pruned model and the
    winner."""
    config = written_config(folder, model)
    raw = with_key(yaml.safe_load(config.read_text()), "finetune.compare", False)
    del raw["finetune"]["seeds"]
    config.write_text(yaml.safe_dump(raw | {"output": output}))
    return config


def trials_at(store: Store, run: str) -> list[Raw]:
    keys = sorted(key for key in store.keys(f"{run}/trials") if key.endswith("/trial.json"))
    return [json.loads(store.read(f"{run}/trials/{key}")) for key in keys]


def has_finished_trial(store: Store, run: str) -> bool:
    trials = trials_at(store, run)
    return len(trials) > 1 and trials[0]["status"] == "finished"


KILLED = "killed/run"
TakenUp = tuple[list[Raw], Raw]


@pytest.fixture(scope="module")
def taken_up(store: Store, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TakenUp:
    """The trials when the driver was killed, and the output of the same command on an empty
    machine."""
    folder = tmp_path_factory.mktemp("killed")
    config = config_at(store.uri(KILLED), folder / "a", tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        talk_to(store, patch)
        patch.setenv("QPRUNER_CACHE", str(folder / "first"))
        kill_when(config, lambda: has_finished_trial(store, KILLED))
        before = trials_at(store, KILLED)
        shutil.rmtree(folder / "first")
        patch.setenv("QPRUNER_CACHE", str(folder / "second"))
        return before, json.loads(said(config, "--json").splitlines()[-1])


def test_a_killed_run_ends_as_undisturbed_on_another_machine(
    store: Store, taken_up: TakenUp, undisturbed: Raw
) -> None:
    before, told = taken_up
    assert told["run"] == store.uri(KILLED)
    trials = trials_at(store, KILLED)
    # The finished trial was not run again.
    assert trials[0] == before[0]
    report = json.loads(store.read(f"{KILLED}/results.json"))
    assert {"report": comparable(report), "trials": comparable(trials)} == undisturbed
    assert report["standing"].startswith("Finished; resumed 1 time ")
    keys = store.keys(KILLED)
    for part in (
        "cuts/cut-20/model.safetensors",
        "banks/cut-20/nf4/layers.0.o.json",
        "final/adapter_model.safetensors",
        "report.html",
    ):
        assert part in keys
    assert any(key.startswith("tensorboard/trial-0000") for key in keys)
    assert "qpruner.log" in keys
    assert "driver.lock" not in keys
    assert not any("checkpoints/" in key for key in keys)


def test_verbs_for_finished_runs_accept_a_uri(
    store: Store, taken_up: TakenUp, tmp_path: Path
) -> None:
    def output(*words: str) -> str:
        return run_program(sys.executable, "-m", "qpruner", *words, minutes=5).stdout

    uri = store.uri(KILLED)
    status = json.loads(output("status", uri, "--json"))
    assert_has(status, run=uri, outcome="done")
    assert len(json.loads(output("trials", uri, "--json"))["trials"]) == len(
        trials_at(store, KILLED)
    )
    assert uri in output("plan", uri)
    merged = tmp_path / "merged"
    exported = json.loads(
        output("export", uri, "--to", "merged", "--out", str(merged), "--json").splitlines()[-1]
    )
    assert exported["status"] == "ok"
    assert (merged / "config.json").is_file()


def test_only_damaged_objects_are_set_aside_and_made_again(
    store: Store, taken_up: TakenUp, tiny_model: Path, tmp_path: Path
) -> None:
    run = "damaged/run"
    entry = "banks/cut-20/nf4/layers.0.o.safetensors"
    store.copy(KILLED, run, ("prepare", "cuts", "prune", "bank", "banks", "records", "run.json"))
    for name in ("cuts/cut-20/model.safetensors", entry):
        store.damage(f"{run}/{name}")
    store.delete(f"{run}/records/sensitivity.json")
    config = config_at(store.uri(run), tmp_path / "a", tiny_model)
    # it reads the bank
    raw = with_key(yaml.safe_load(config.read_text()), "sensitivity.methods", ["first_order"])
    config.write_text(yaml.safe_dump(raw))
    said = ended(config, "sensitivity").said()
    [aside] = [key for key in store.keys(f"{run}/damaged") if key.endswith("/model.safetensors")]
    assert "[prepare] already recorded" in said
    assert "[prune] done" in said
    assert f"s3://runs/{run}/cuts/cut-20/model.safetensors is damaged" in said
    assert f"set aside in s3://runs/{run}/damaged/{aside.partition('/')[0]}" in said
    assert "[bank] already recorded" in said
    assert (
        f"s3://runs/{run}/{entry} is damaged and made again"
        in store.read(f"{run}/qpruner.log").decode()
    )
    for name in ("cuts/cut-20/model.safetensors", entry):
        assert store.read(f"{run}/{name}") == store.read(f"{KILLED}/{name}")


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_server_away_is_waited_for_then_reported(
    comes_back: bool,
    store: Store,
    taken_up: TakenUp,
    undisturbed: Raw,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    run = f"away-{comes_back}/run"
    store.copy(
        KILLED,
        run,
        ("prepare", "cuts", "prune", "bank", "banks", "sensitivities", "records", "run.json"),
    )
    for name in ("search", "finetune", "evaluate"):
        store.delete(f"{run}/records/{name}.json")
    config = config_at(store.uri(run), tmp_path / "a", tiny_model)
    gate = Gate(store.port)
    patience = {"QPRUNER_STORAGE_PATIENCE_SECONDS": "100" if comes_back else "2"}
    with driver(config, AWS_ENDPOINT_URL=f"http://127.0.0.1:{gate.port}", **patience) as process:
        process.wait_until(lambda: has_finished_trial(store, run), "a finished trial")
        gate.shut()
        if comes_back:
            time.sleep(15)
            gate.open()
        code, said = process.end()
    assert code == (0 if comes_back else 1), said[-3000:]
    if not comes_back:
        told = json.loads(said.splitlines()[-1])
        # It is no error of Ray Tune.
        assert told["kind"] == "StageError"
        assert "cannot be reached" in told["error"]
        assert "bring the storage back" in told["error"]
        ended(config)
    rungs = [trial["rungs"] for trial in trials_at(store, run)]
    assert comparable(rungs) == [trial["rungs"] for trial in undisturbed["trials"]]
