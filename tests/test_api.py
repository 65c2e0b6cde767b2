"""qpruner from Python: a run up to a stage, the log of a run, and unexpected errors."""

import gc
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Raw, command, with_key

import qpruner
from qpruner.errors import UserError
from qpruner.pipeline.prepare import Prepare
from qpruner.runs.records import RunState
from qpruner.runs.run_dir import RunDir

WriteYaml = Callable[[Raw], Path]


def test_a_run_continues_after_a_stage_and_logs(
    tiny_raw: Raw,
    write_yaml: WriteYaml,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The stages up to the sensitivities need no Ray; recorded stages do not run again."""
    config = write_yaml(with_key(tiny_raw, "sensitivity.methods", ["fisher"]))
    before = (logging.getLogger().handlers[:], logging.getLogger().level, warnings.showwarning)
    gc.unfreeze()
    pruned = qpruner.run(config, "prune.rate=0.3", until="prune")
    assert pruned.results.bank is None
    assert pruned.results.prune.cuts["cut-30"].achieved_rate > 0.2
    # A notebook's own garbage is collected again.
    assert not gc.get_freeze_count()
    gc.freeze()
    further = qpruner.run(config, "prune.rate=0.3", until="sensitivity")
    assert further.results.prune == pruned.results.prune
    assert further.results.sensitivity
    states = {name: stage.state for name, stage in further.state.stages.items()}
    assert states == {
        "prepare": "recorded",
        "prune": "recorded",
        "bank": "done",
        "sensitivity": "done",
    }
    assert "prune" in capsys.readouterr().out
    said = (tmp_path / "run" / "qpruner.log").read_text()
    assert said.count("[prune] done in") == 1
    assert "[prune] already recorded: " in said
    assert "[bank] done in" in said
    # Everything is as it was before.
    assert (
        logging.getLogger().handlers,
        logging.getLogger().level,
        warnings.showwarning,
    ) == before
    # What the caller excluded stays so.
    assert gc.get_freeze_count()


def broken(*_: Any) -> Any:
    warnings.warn("a library's word", stacklevel=1)
    raise ZeroDivisionError("nobody foresaw this")


def test_an_unexpected_error_has_a_remedy(
    tiny_raw: Raw, write_yaml: WriteYaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy is on the terminal, in the state and log of the run, in the JSON, and in the
    Python exception."""
    monkeypatch.setattr(Prepare, "run", broken)
    config = write_yaml(tiny_raw)
    log = tmp_path / "run" / "qpruner.log"

    def state() -> Any:
        return RunDir(tmp_path / "run").read_state(RunState)

    done = command("prepare", config, "--json")
    assert done.exit_code == 1
    told = "ZeroDivisionError: nobody foresaw this\n  remedy: "
    assert told in done.stderr
    assert f"please report it with {log}" in done.stderr
    assert done.stderr.count("remedy:") == 1
    assert "can be repeated" in json.loads(done.stdout.splitlines()[-1])["error"]
    assert told in str(state().error)
    assert told in log.read_text()
    assert "a library's word" in log.read_text()
    with pytest.raises(ZeroDivisionError) as caught:
        qpruner.run(config, "seed=1", until="prepare")
    # The command of a call from Python.
    assert state().command == f"qpruner prepare {config} --set seed=1"
    assert [str(log) in note for note in caught.value.__notes__] == [True]
    assert log.read_text().count(told) == 2
    with pytest.raises(ZeroDivisionError):
        qpruner.run(config, until="serve")
    # `serve` is no command.
    assert state().command == f"qpruner run {config}"


def test_an_unexpected_error_without_a_run_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qpruner.cli.run_verbs.read_snapshot", broken)
    done = command("status", tmp_path)
    assert done.exit_code == 1
    assert done.stderr.rstrip().endswith("please report it with the output above")


def test_an_output_without_write_access_is_refused(tiny_raw: Raw, write_yaml: WriteYaml) -> None:
    """In /proc not even root can create folders."""
    with pytest.raises(
        UserError, match=r"`output`: /proc/1/run cannot be written .*; name another folder"
    ):
        qpruner.run(write_yaml(with_key(tiny_raw, "output", "/proc/1/run")), until="prepare")
