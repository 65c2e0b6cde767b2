"""What a user installs: wheel and source archive of a fresh checkout, beside the dependencies and nothing else."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkouts import copy_checkout, git

from qpruner.version import VERSION

VERSION_MODULE = Path("qpruner") / "version.py"


@dataclass(frozen=True)
class Installation:
    """A wheel, built from a source archive, in an environment of its own.

    Attributes:
        checkout: The git checkout that was built.
        archive: The source archive.
        environment: The virtual environment.
    """

    checkout: Path
    archive: Path
    environment: Path

    def run(self, *command: str) -> str:
        """What a command prints that this environment holds; nothing of the checkout is on its path."""
        bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        path = f"{self.environment / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            command, cwd=self.environment, env=bare | {"PATH": path}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("packaging")
    checkout, environment = copy_checkout(folder / "checkout"), folder / "environment"
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--all")
    git(checkout, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message", "all")
    # Builds the source archive, unpacks it where no git is, and builds the wheel from that.
    _python("-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(checkout))
    _python("-m", "venv", "--without-pip", str(environment))
    (site,) = environment.glob("lib/python*/site-packages")
    # The dependencies as they are. What .pth files lie there are not followed: the editable install stays unseen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = (folder / "dist").glob("*.whl")
    into = ("--python", str(environment / "bin" / "python"))
    _python("-m", "pip", *into, "install", "--quiet", "--no-index", "--no-deps", str(wheel))
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return Installation(checkout, archive, environment)


def _python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_version_names_the_commit_that_was_built(installed: Installation) -> None:
    commit = git(installed.checkout, "rev-parse", "HEAD")
    assert installed.run("qpruner", "--version") == f"qpruner, version {VERSION} (commit {commit[:12]})\n"


def test_the_help_of_what_was_installed(installed: Installation) -> None:
    told = installed.run("qpruner", "--help")
    assert "Make a large language model fit the memory you have" in told


def test_every_file_of_the_package_is_installed(installed: Installation) -> None:
    """The demo's data and tasks, the page's template and style, `py.typed`."""
    package = Path(installed.run("python", "-c", "import qpruner; print(qpruner.__path__[0])").strip())
    assert package.is_relative_to(installed.environment)
    there = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    tracked = git(installed.checkout / "qpruner", "ls-files").splitlines()
    assert {name for name in there if "__pycache__" not in name} == {*tracked, "commit.txt"}


def test_the_source_archive_has_what_a_checkout_has(installed: Installation) -> None:
    with tarfile.open(installed.archive) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(git(installed.checkout, "ls-files").splitlines())
    assert {name for name in tracked - there if not name.startswith(".")} == set()


def test_a_checkout_tells_its_commit_and_whether_it_was_modified(installed: Installation, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "--quiet", str(installed.checkout), str(checkout))
    commit = git(checkout, "rev-parse", "HEAD")[:12]
    assert _described(checkout) == f"{VERSION} (commit {commit})"
    (checkout / "README.md").write_text("another")
    assert _described(checkout) == f"{VERSION} (commit {commit}+modified)"


def test_without_git_or_a_build_no_commit_is_claimed(installed: Installation, tmp_path: Path) -> None:
    """A folder inside somebody else's repository must not be given that one's commit."""
    theirs = tmp_path / "theirs"
    git(tmp_path, "clone", "--quiet", str(installed.checkout), str(theirs))
    assert _described(copy_checkout(theirs / "unpacked")) == VERSION


def _described(checkout: Path) -> str:
    return str(runpy.run_path(str(checkout / VERSION_MODULE))["describe"]())


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("qpruner st", {"status"}), ("qpruner run --a", {"--address"}), ("qpruner export --to m", {"merged"})],
)
def test_bash_completes(typed: str, offered: set[str], installed: Installation) -> None:
    words = typed.split()
    script = (
        'eval "$(_QPRUNER_COMPLETE=bash_source qpruner)"\n'
        f"COMP_WORDS=({typed}) COMP_CWORD={len(words) - 1}\n"
        "_qpruner_completion qpruner\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert set(installed.run("bash", "-c", script).split()) == offered
