"""What Ctrl-C leaves a person with: a command that their shell can run as it stands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qpruner.cli.main import _guarded


def interrupted() -> dict[str, object]:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("on_path", "program"), [(True, "qpruner"), (False, ".venv/bin/qpruner")])
def test_the_command_to_go_on_with_is_found_by_this_shell(
    on_path: bool, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "qpruner"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if on_path else "/nowhere")
    monkeypatch.setattr(sys, "argv", [".venv/bin/qpruner", "run", "my config.yaml"])
    with pytest.raises(SystemExit) as ended:
        _guarded(False, interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"interrupted; go on with: {program} run 'my config.yaml'\n"
