"""Whole runs on the two-layer model by the command line, undisturbed or killed.

`tests/conftest.py` loads the fixtures.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_driver import config_file, trials_of

MINUTES = 60.0
NOT_COMPARED = {
    *(
        "seconds",
        "search_seconds",
        "gpu_seconds",
        "scoring_seconds",
        "scoring_gpu_seconds",
        "times",
        "begun",
        "sessions",
        "resumed",
    ),
    *("peak_memory_bytes", "inference", "inference_memory_bytes"),
    *("prefill_tokens_per_second", "decode_tokens_per_second"),
    *(
        "model_path",
        "output",
        "worker",
        "node",
        "device",
        "checkpoint",
        "environment",
        "state",
        "standing",
        "record_digest",
        "scored",
    ),
}
"""Fields that may differ between two runs of one configuration, such as times, memory and folders.
"""
TEST_QUESTIONS = {
    "source": "package:qpruner/demo/data/questions_test.jsonl",
    "format": "text",
    "columns": {"text": "question"},
}


def command(config: Path, *options: str, verb: str = "run") -> list[str]:
    return [sys.executable, "-m", "qpruner", verb, str(config), *options]


def said(config: Path, *options: str, verb: str = "run") -> str:
    """Run a command that must succeed, and return its stdout."""
    ended = subprocess.run(
        command(config, *options, verb=verb), capture_output=True, text=True, timeout=15 * MINUTES
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def comparable(value: Any) -> Any:
    """Return a result without the fields that may differ."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in NOT_COMPARED}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def num_tuned(root: Path) -> int:
    """Count the recorded fine-tunes of the final table."""
    records = [json.loads(path.read_text()) for path in root.glob("candidates/*/record.json")]
    return len([record for record in records if record["seed"] == 1])


def outcome(root: Path) -> dict[str, Any]:
    """Return the comparable data of the report and of every trial."""
    trials = list(trials_of(root).values())
    return comparable({"report": json.loads((root / "results.json").read_text()), "trials": trials})


def written_config(folder: Path, model: Path) -> Path:
    keys = {
        # then the order of results, and with it every proposal, is fixed
        "search.max_concurrent": 1,
        "search.max_trials": 5,  # three of them are controls
        "sensitivity.methods": ["mutual_information"],
        "finetune.seeds": 1,
        "finetune.random_plans": 1,
        "evaluate.limit": 4,
        "evaluate.text": [TEST_QUESTIONS],
    }
    return config_file(model, folder, **keys)


def is_ray_agent(process: psutil.Process) -> bool:
    """Return True for two processes of Ray that end up to 95 s after their raylet (measured, Ray
    2.60)."""
    try:
        return process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    except psutil.NoSuchProcess:
        return False


def kill_when(
    config: Path,
    condition: Callable[[], bool],
    number: signal.Signals = signal.SIGKILL,
    *options: str,
) -> None:
    """Start a run, signal the driver when the condition holds, and wait until the processes of Ray
    have ended."""
    driver = subprocess.Popen(
        command(config, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    descendants: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 4 * MINUTES
        while not condition():
            assert driver.poll() is None, "the run ended before the kill point was reached"
            assert time.monotonic() < deadline, "the kill point was not reached"
            time.sleep(0.02)
        descendants = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(number)
        driver.wait(timeout=MINUTES)
        _, alive = psutil.wait_procs(
            [p for p in descendants if not is_ray_agent(p)], timeout=MINUTES
        )
        assert not alive, f"left over after the driver's death: {alive}"
    finally:
        for process in [
            *descendants,
            *([psutil.Process(driver.pid)] if driver.poll() is None else []),
        ]:
            if process.is_running():
                process.kill()


def has_claim(root: Path, claim: str) -> bool:
    """Return True if report and model card have every line of the claim."""
    pages = [(root / name).read_text() for name in ("report.md", "final/README.md")]
    return all(line in page for page in pages for line in claim.splitlines())


@pytest.fixture(scope="module")
def ended(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished run, and the JSON object on its last line of stdout."""
    config = written_config(tmp_path_factory.mktemp("undisturbed") / "a", tiny_model)
    return config.parent / "run", json.loads(said(config, "--json").splitlines()[-1])


@pytest.fixture
def undisturbed(ended: tuple[Path, dict[str, Any]]) -> Path:
    return ended[0]
