"""Leaves the commit in what is built, for `qpruner --version` where there is no git; all else is in
pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

VERSION = runpy.run_path("qpruner/runs/version.py")


def leave_commit(package: Path) -> None:
    commit = VERSION["commit"]()
    if commit is not None:
        (package / VERSION["COMMIT_FILE"]).write_text(f"{commit}\n")


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install is a checkout: it asks git
            leave_commit(Path(self.build_lib) / "qpruner")


class ArchiveWithCommit(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        leave_commit(Path(base_dir) / "qpruner")


setup(cmdclass={"build_py": BuildWithCommit, "sdist": ArchiveWithCommit})
