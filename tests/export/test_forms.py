"""Exports for other programs are complete or not there, say what they changed, and leave the run as
it was."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import command, disk_of, fill
from final_models import outcome_of, pruned_model, run_of, run_of_llama
from gguf import GGUFReader
from object_store import Machine
from tiny_families import family_model

from qpruner.errors import StorageError, UserError
from qpruner.export.forms import export
from qpruner.models.checkpoint import read_tensors
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import folder_digests, storage_at

HIDDEN = ".out.qpruner-export"
KILLED = """
import os, signal, sys
from pathlib import Path
from qpruner.export.forms import export
from qpruner.runs.run_dir import RunDir

def on_progress(what, done, total):
    if what == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

export(RunDir(sys.argv[1]), "gguf_merged", Path(sys.argv[1], "out"), on_progress)
"""


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of_llama(tiny_model, tmp_path_factory.mktemp("s"), ("q4_0", "q8_0"), "q8_0")


def names_in(folder: Path, pattern: str = "*") -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def test_a_plan_of_llama_cpp_keeps_its_formats(searched: Path) -> None:
    before = folder_digests(searched)
    outcome = outcome_of(searched, "--to", "gguf")
    folder = searched / "export" / "gguf"
    assert names_in(folder) == {"run.gguf", "run-adapter.gguf", "Modelfile", "qpruner_export.json"}
    assert not outcome["recoded"]
    assert not outcome["remarks"]
    assert outcome["by"].startswith("xllamacpp")
    tensors = [tensor for file in folder.glob("*.gguf") for tensor in GGUFReader(file).tensors]
    assert outcome["tensor_bytes"] == sum(tensor.n_bytes for tensor in tensors)
    stored = read_tensors(searched / "final", lambda name: True).values()
    # Norms and biases are in float32.
    more = sum(2 * tensor.numel() for tensor in stored if tensor.dim() == 1)
    assert outcome["tensor_bytes"] == outcome["plan_bytes"] + more
    assert abs(outcome["loss"] - outcome["loss_before"]) < 0.05
    assert "0.02 MB are tokenizer and metadata" in outcome["output"]
    assert "FROM ./run.gguf\nADAPTER ./run-adapter.gguf\n" in (folder / "Modelfile").read_text()
    shutil.rmtree(folder.parent)
    assert folder_digests(searched) == before


def test_layers_that_llama_cpp_lacks_are_told(tiny_model: Path, tmp_path: Path) -> None:
    pruned = pruned_model("qwen3", tiny_model, tmp_path / "pruned", False)
    run = run_of(pruned, tmp_path / "run", ("nf4", "q5_0"))
    outcome = outcome_of(run, "--to", "gguf", "--merge")
    folder = run / "export" / "gguf_merged"
    assert outcome["folder"] == str(folder)
    assert names_in(folder) == {"run.gguf", "Modelfile", "qpruner_export.json"}
    assert outcome["remarks"] == ["15 layers from nf4 to q4_0"]
    assert set(outcome["recoded"].values()) == {"q4_0"}
    assert "15 layers from nf4 to q4_0" in outcome["output"]
    assert "as served" in outcome["output"]


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_only_packed_forms_can_be_merged(searched: Path, form: str) -> None:
    done = command("export", searched, "--to", form, "--merge")
    assert done.exit_code == 2
    assert "`--merge`" in done.output
    assert "`--to gguf`" in done.output
    assert "`--to vllm`" in done.output


@pytest.mark.parametrize("form", ["gguf", "vllm"])
def test_a_family_without_a_writer_is_refused(form: str, tmp_path: Path) -> None:
    """Before any work: the model has no weights here."""
    family_model("opt").config.save_pretrained(tmp_path / "final")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "final" / name).write_text("{}")
    with pytest.raises(UserError, match=rf"cannot be exported as {form}: .*opt.*`.*--to merged`"):
        export(RunDir(tmp_path), form, tmp_path / "out")  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("form", ["gguf", "merged"])
def test_a_full_disk_leaves_nothing(searched: Path, form: str, tmp_path: Path) -> None:
    before = folder_digests(searched)
    with disk_of("4m", tmp_path / "disk") as disk:
        filler = fill(disk, leave=100_000)
        with pytest.raises(StorageError, match="no space left"):
            export(RunDir(searched), form, disk / "out")  # type: ignore[arg-type]
        assert list(disk.iterdir()) == [filler]
    assert folder_digests(searched) == before


@pytest.mark.slow
def test_a_killed_export_is_not_there(searched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(searched, tmp_path / "run"))
    before = folder_digests(run)
    killed = subprocess.run([sys.executable, "-c", KILLED, run, "writing GGUF"], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert not (run / "out").exists()
    assert (run / HIDDEN / "out" / "run.gguf").exists(), "it was killed too early"
    export(RunDir(run), "merged", run / "out")
    assert not (run / HIDDEN).exists()
    assert not list((run / "out").rglob("*.gguf"))
    shutil.rmtree(run / "out")
    assert folder_digests(run) == before


@pytest.mark.slow
def test_an_export_that_is_told_to_end_leaves_nothing(searched: Path, tmp_path: Path) -> None:
    verb = [sys.executable, "-m", "qpruner", "export", searched]
    asked = [*verb, "--to", "gguf", "--out", tmp_path / "out"]
    with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.rglob("*.gguf")):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert "interrupted" in process.communicate(timeout=60)[1]
    assert not list(tmp_path.iterdir())


def test_a_folder_of_two_exports_is_refused_and_neighbours_stay(
    searched: Path, tmp_path: Path
) -> None:
    (tmp_path / ".out").mkdir()
    (tmp_path / ".out" / "precious").touch()
    refused: list[object] = []

    def again(*_: object) -> None:
        if not refused:
            with pytest.raises(UserError, match=r"by another command: .*`--out`") as error:
                export(RunDir(searched), "peft", tmp_path / "out")
            refused.append(error)

    export(RunDir(searched), "peft", tmp_path / "out", again)
    assert refused
    assert names_in(tmp_path) == {".out", "out"}
    assert names_in(tmp_path / ".out") == {"precious"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/out", "out cannot be made (Not a directory): name another folder"),
        ("s3://bucket/out", "`--out` must be a folder on this machine, got s3://bucket/out"),
    ],
)
def test_a_place_that_cannot_be_a_folder_is_refused(
    place: str, message: str, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    done = command("export", searched, "--to", "peft", "--out", place)
    assert done.exit_code == 2
    assert message in done.output


def test_files_of_a_run_at_a_uri_have_its_last_name(
    searched: Path, machine: Machine, tmp_path: Path
) -> None:
    run = machine("first")
    for name in ("final", "prepare/data"):
        storage_at(run.root / name).put_folder(searched / name)
    outcome_of(run.place, "--to", "gguf", "--out", tmp_path / "out")
    assert names_in(tmp_path / "out", "*.gguf") == {"run.gguf", "run-adapter.gguf"}
