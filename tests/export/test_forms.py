"""Exports for other programs are complete or not there, say what they changed, and leave the run as
it was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import command, disk_of, fill
from final_models import pruned_model, run_of
from gguf import GGUFReader
from object_store import Machine
from tiny_families import family_model

from qpruner.errors import StorageError, UserError
from qpruner.export.forms import export
from qpruner.models.checkpoint import read_tensors
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import file_digest, storage_at

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
    root = tmp_path_factory.mktemp("searched")
    return run_of(
        pruned_model("llama", tiny_model, root / "pruned", True),
        root / "demo",
        ("q4_0", "q8_0"),
        "q8_0",
    )


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): file_digest(path) for path in root.rglob("*") if path.is_file()
    }


def test_a_plan_of_llama_cpp_keeps_its_formats(searched: Path) -> None:
    before = digests(searched)
    folder = searched / "export" / "gguf"
    done = command("export", searched, "--to", "gguf", "--json")
    assert done.exit_code == 0, done.output
    outcome = json.loads(done.output.splitlines()[-1])
    names = {"demo.gguf", "demo-adapter.gguf", "Modelfile", "qpruner_export.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert not outcome["recoded"]
    assert not outcome["remarks"]
    assert outcome["by"].startswith("xllamacpp")
    files = list(folder.glob("*.gguf"))
    stored = read_tensors(searched / "final", lambda name: True)
    assert outcome["tensor_bytes"] == sum(
        each.n_bytes for file in files for each in GGUFReader(file).tensors
    )
    more = sum(2 * each.numel() for each in stored.values() if each.dim() == 1)
    assert outcome["tensor_bytes"] == outcome["plan_bytes"] + more, (
        "norms and biases are in float32"
    )
    assert abs(outcome["loss"] - outcome["loss_before"]) < 0.05
    assert "of which 0.02 MB are tokenizer and metadata" in done.output
    assert "FROM ./demo.gguf\nADAPTER ./demo-adapter.gguf\n" in (folder / "Modelfile").read_text()
    shutil.rmtree(folder.parent)
    assert digests(searched) == before


def test_layers_that_llama_cpp_lacks_are_told(tiny_model: Path, tmp_path: Path) -> None:
    pruned = pruned_model("qwen3", tiny_model, tmp_path / "pruned", False)
    run = run_of(pruned, tmp_path / "run", ("nf4", "q5_0"))
    done = command("export", run, "--to", "gguf", "--merge", "--json")
    assert done.exit_code == 0, done.output
    outcome = json.loads(done.output.splitlines()[-1])
    folder = run / "export" / "gguf_merged"
    assert outcome["folder"] == str(folder)
    assert {path.name for path in folder.iterdir()} == {
        "run.gguf",
        "Modelfile",
        "qpruner_export.json",
    }
    assert outcome["remarks"] == ["15 layers from nf4 to q4_0"]
    assert set(outcome["recoded"].values()) == {"q4_0"}
    assert "15 layers from nf4 to q4_0" in done.output
    assert "as served" in done.output


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_only_packed_forms_can_be_merged(searched: Path, form: str) -> None:
    done = command("export", searched, "--to", form, "--merge")
    assert done.exit_code == 2
    assert "`--merge` goes with `--to gguf` and `--to vllm`" in done.output


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
    before = digests(searched)
    with disk_of("4m", tmp_path / "disk") as disk:
        filler = fill(disk, leave=100_000)
        with pytest.raises(StorageError, match="no space left"):
            export(RunDir(searched), form, disk / "out")  # type: ignore[arg-type]
        assert list(disk.iterdir()) == [filler]
        assert digests(searched) == before


@pytest.mark.slow
def test_a_killed_export_is_not_there(searched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(searched, tmp_path / "run"))
    before = digests(run)
    killed = subprocess.run([sys.executable, "-c", KILLED, run, "writing GGUF"], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert not (run / "out").exists()
    assert (run / HIDDEN / "out" / "run.gguf").exists(), "it was killed too early"
    export(RunDir(run), "merged", run / "out")
    assert not (run / HIDDEN).exists()
    assert not list((run / "out").rglob("*.gguf"))
    shutil.rmtree(run / "out")
    assert digests(run) == before


@pytest.mark.slow
def test_an_export_that_is_told_to_end_leaves_nothing(searched: Path, tmp_path: Path) -> None:
    asked = [
        sys.executable,
        "-m",
        "qpruner",
        "export",
        str(searched),
        "--to",
        "gguf",
        "--out",
        str(tmp_path / "out"),
    ]
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
    refused: list[str] = []

    def again(*_: object) -> None:
        if not refused:
            with pytest.raises(
                UserError, match=r"out is being written by another command: .*`--out`"
            ) as error:
                export(RunDir(searched), "peft", tmp_path / "out")
            refused.append(str(error.value))

    export(RunDir(searched), "peft", tmp_path / "out", again)
    assert refused
    assert {path.name for path in tmp_path.iterdir()} == {".out", "out"}
    assert (tmp_path / ".out" / "precious").exists()


def test_a_place_that_cannot_be_a_folder_is_refused(searched: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command("export", searched, "--to", "peft", "--out", tmp_path / "file" / "out")
    assert done.exit_code == 2
    assert "out cannot be made (Not a directory): name another folder" in done.output
    done = command("export", searched, "--to", "peft", "--out", "s3://bucket/out")
    assert done.exit_code == 2
    assert "`--out` must be a folder on this machine, got s3://bucket/out" in done.output


def test_files_of_a_run_at_a_uri_have_its_last_name(
    searched: Path, machine: Machine, tmp_path: Path
) -> None:
    run = machine("first")
    for name in ("final", "prepare/data"):
        storage_at(run.root / name).put_folder(searched / name)
    done = command("export", run.place, "--to", "gguf", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").glob("*.gguf")} == {
        "run.gguf",
        "run-adapter.gguf",
    }
