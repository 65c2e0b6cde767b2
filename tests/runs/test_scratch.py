"""Folders of processes that are killed do not stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpruner.runs.scratch import working_folder

PREFIX = "qpruner-test-"
HOLD = f"""
import sys
from qpruner.runs.scratch import working_folder
with working_folder({PREFIX!r}) as folder:
    (folder / "rung").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_with_the_next_and_what_others_work_in_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    foreign, file, linked = (tmp_path / f"{PREFIX}{name}" for name in ("foreign", "file", "linked"))
    foreign.mkdir()
    os.chown(foreign, 12345, -1)
    file.touch()
    (tmp_path / "kept").mkdir()
    linked.symlink_to(tmp_path / "kept")
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout
        theirs = Path(process.stdout.readline().decode().strip())
        with working_folder(PREFIX) as first, working_folder(PREFIX) as second:
            assert (theirs / "rung").is_dir() and first.is_dir() and second.is_dir()
            assert first.stat().st_mode & 0o777 == 0o700
        assert not first.exists() and not second.exists()
        process.kill()
        process.wait()
    assert (theirs / "rung").is_dir()
    with working_folder(PREFIX) as ours:
        assert set(tmp_path.glob(f"{PREFIX}*")) == {ours, foreign, file, linked}
    assert (tmp_path / "kept").is_dir()
