"""The work of a worker for a run at a URI, on machines without local copies; without Ray, on a real
S3 server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import assert_has, raw_config, texts, with_key
from mixed_models import held_out_scoring, row_job
from object_store import Store, talk_to

from qpruner.config.load import validate_config
from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile, StageError
from qpruner.pipeline import preflight
from qpruner.pipeline.context import Context
from qpruner.pipeline.finetune import Finetune
from qpruner.pipeline.preflight_rows import include_path
from qpruner.pipeline.run import run
from qpruner.pipeline.tuning import setting_aside_damaged_folder
from qpruner.runs.records import SELECTION
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import (
    FILES,
    children,
    fetch,
    files_in,
    objects,
    published_folders,
    storage_at,
    write_text,
)
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob
from qpruner.training.checkpoints import TRAINED_WEIGHTS
from qpruner.training.jobs import FineTuneJob, Scoring, score, tune

pytestmark = pytest.mark.slow

Machine = Callable[[str], FineTuneJob]

FINETUNE = """
import sys
from qpruner.training import checkpoints
checkpoints.SECONDS = checkpoints.COST = 0
from test_at_uri import job_of
from qpruner.training.jobs import tune
tune(job_of(sys.argv[1], sys.argv[2]))
"""


@contextmanager
def finetune_elsewhere(config_file: Path, row: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that fine-tunes a row, and wait for its first checkpoint."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FINETUNE, str(config_file), row]
    checkpoints = job_of(str(config_file), row).checkpoints
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 240
            while not any(name.endswith(FILES) for name in children(checkpoints)):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def config_file(
    store: Store, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A configuration whose run has a bank, made on a machine that is gone."""
    folder = tmp_path_factory.mktemp("uri")
    with pytest.MonkeyPatch.context() as patch:
        talk_to(store, patch)
        patch.setenv(objects.CACHE, str(folder / "first"))
        raw = with_key(raw_config(tiny_model, folder), "output", store.uri("run"))
        config = validate_config(with_key(raw, "finetune.steps", 12))
        run(config, lambda event: None, until="bank")
        (folder / "config.json").write_text(config.model_dump_json())
        yield folder / "config.json"


@pytest.fixture
def machine(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Switch to a machine of some name, and return the job of a row there."""

    def go(name: str, row: str = "searched") -> FineTuneJob:
        monkeypatch.setenv(objects.CACHE, str(tmp_path / name))
        return job_of(str(config_file), row)

    return go


def job_of(config_file: str, row: str) -> FineTuneJob:
    config = RunConfig.model_validate_json(Path(config_file).read_text())
    evaluate = config.evaluate.model_copy(update={"include_path": include_path(config)})
    config = config.model_copy(update={"evaluate": evaluate})
    return row_job(config, RunDir(config.output).candidates / row)


def test_a_fine_tune_resumes_on_another_machine(machine: Machine, config_file: Path) -> None:
    whole, _ = tune(machine("whole", "whole"))
    job = machine("second")
    with finetune_elsewhere(config_file, "searched") as process:
        process.kill()
    job = machine("third")
    sent = [path.name for path in published_folders(job.checkpoints)]
    assert sent
    assert "checkpoint-12" not in sent
    found, _ = tune(job)
    assert_has(found, steps=12, train_loss=whole.train_loss, losses=whole.losses)
    assert [path.name for path in published_folders(job.checkpoints)] == ["checkpoint-12"]
    assert {"adapter", "adapter.files.json", "progress"} <= set(children(job.folder))
    jobs = [machine("fourth", row) for row in ("whole", "searched")]
    one, other = (score(replace(job, scoring=held_out_scoring(job.config))) for job in jobs)
    assert one.tasks
    assert one.tasks == other.tasks


def test_a_further_seed_leaves_nothing_on_its_machine(machine: Machine) -> None:
    job = replace(machine("seeded", "seed-1"), scoring=Scoring(rows=SELECTION))
    tune(replace(job, survives_divergence=True))
    assert published_folders(job.checkpoints)
    assert not storage_at(job.checkpoints).staging.exists()


def test_a_row_with_a_damaged_adapter_is_set_aside(
    machine: Machine, store: Store, tmp_path: Path
) -> None:
    run_dir = RunDir(machine("evaluating").config.output)
    adapter = run_dir.candidates / "0123abcd" / "adapter"
    (tmp_path / TRAINED_WEIGHTS["adapter"]).write_bytes(b"weights")
    storage_at(adapter).put_folder(tmp_path)
    write_text(adapter.with_name("record.json"), "{}")
    store.damage(f"run/candidates/0123abcd/trained/{TRAINED_WEIGHTS['adapter']}")
    with pytest.raises(StageError) as caught, setting_aside_damaged_folder(run_dir, "evaluate"):
        fetch(adapter)
    [aside] = children(run_dir.candidates / "damaged")
    place = f"{run_dir.place}/candidates"
    assert f"{place}/0123abcd/trained/{TRAINED_WEIGHTS['adapter']} is damaged" in caught.value.cause
    assert f"set aside in {place}/damaged/{aside}" in caught.value.cause
    assert caught.value.remedy == "repeat the command: only that row is fine-tuned again"
    assert not files_in(adapter.parent)
    assert "record.json" in children(run_dir.candidates / "damaged" / aside)
    with pytest.raises(CorruptFile), setting_aside_damaged_folder(run_dir, "evaluate"):
        fetch(run_dir.stage("nowhere"))


def test_a_final_model_with_a_missing_object_is_incomplete(
    machine: Machine, store: Store, tmp_path: Path
) -> None:
    """Somebody may have deleted a damaged object."""
    config = machine("looking").config
    events = []
    context = Context(config, RunDir(config.output), events.append, None, preflight.inspect(config))
    final = context.run_dir.root / "final"
    assert final not in published_folders(context.run_dir.root)
    (folder := tmp_path / "final").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    storage_at(final).put_folder(folder)
    assert final in published_folders(context.run_dir.root)
    assert Finetune(context).is_complete(final)
    assert not events
    store.delete("run/final/model.safetensors")
    assert not Finetune(context).is_complete(final)
    [text] = texts(events)
    assert f"{context.run_dir.place}/final/model.safetensors is missing" in text
    assert "set aside in" in text


def test_a_fine_tune_taken_over_writes_nothing_more(machine: Machine, config_file: Path) -> None:
    """Its process is suspended after the first checkpoint, until another machine has finished the
    fine-tune."""
    machine("cut-off", "taken-over")
    with finetune_elsewhere(config_file, "taken-over") as process:
        process.send_signal(signal.SIGSTOP)
        job = machine("other", "taken-over")
        tune(job)
        before = written_in(job.folder)
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=240)[1]
    assert process.returncode and "TakenOver" in said, said[-2000:]
    assert written_in(job.folder) == before


def written_in(folder: Path) -> dict[str, float]:
    """When each file of a row was written, except its progress, which a process writes before it
    notices."""
    names = set(files_in(folder)) - {"progress"}
    return {name: found.modified for name in names if (found := storage_at(folder / name).stat())}


def test_a_trial_runs_on_a_machine_without_local_copies(machine: Machine, tmp_path: Path) -> None:
    job = machine("fifth")
    record = job.record
    materials = Materials({record.cut: job.bank}, job.data)
    trial = TrialJob(job.config, materials, record.plan, record.cut)
    told = []
    run_trial(trial, None, lambda result, checkpoint: told.append(result))
    assert [result.step for result in told] == [1, 2, 4]
    # One file per group of the plan; the other files of the bank are not downloaded.
    copies = list((tmp_path / "fifth" / "bank").iterdir())
    assert len(copies) == len(record.plan)
