"""A run writes no token of the environment to its records, logs or TensorBoard files, or to Ray's
files."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import raw_config, run_program, with_key

from qpruner.runs.logs import logging_to, quiet_libraries

NAMES = (
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
    "WANDB_API_KEY",
)
SECRETS = {name: f"secret-{number}-of-{name.lower()}" for number, name in enumerate(NAMES)}
"""Environment variables that hubs, clouds, Ray and trackers read; nothing here connects to them."""


@pytest.fixture
def ray_files() -> Iterator[Path]:
    """A folder for Ray's files, with a short path because socket names must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


def test_urls_of_hub_requests_are_not_logged(tmp_path: Path) -> None:
    """A signed URL gives access to a gated model for a while."""
    quiet_libraries()
    with logging_to(tmp_path):
        for name in ("httpx", "httpx2"):
            logging.getLogger(name).info(
                "HTTP Request: GET https://cdn.example/model?Signature=secret"
            )
            logging.getLogger(name).warning("%s was told", name)
    told = (tmp_path / "qpruner.log").read_text()
    assert "httpx was told" in told
    assert "httpx2 was told" in told
    assert "Signature" not in told


@pytest.mark.slow
def test_no_file_of_a_run_or_of_ray_contains_a_token(
    tiny_model: Path, ray_files: Path, tmp_path: Path
) -> None:
    raw = with_key(raw_config(tiny_model, tmp_path / "run"), "search.max_trials", 2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(with_key(raw, "finetune.compare", False)))
    command = (sys.executable, "-m", "qpruner", "run", tmp_path / "config.yaml")
    folders = {"HOME": str(tmp_path / "home"), "RAY_TMPDIR": str(ray_files)}
    done = run_program(*command, environment=os.environ | SECRETS | folders, minutes=8)
    files = [
        path
        for folder in (tmp_path / "run", ray_files)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    told = {path: path.read_bytes() for path in files if not path.is_symlink()}
    kinds = {"qpruner.log", "results.json", "prune.json", "trial.json"}
    # The run's files were looked at.
    assert kinds <= {path.name for path in told}
    # So were those of TensorBoard.
    assert any("tfevents" in path.name for path in told)
    # So were those of Ray.
    assert {"raylet.out", "gcs_server.out"} <= {path.name for path in told}
    told[Path("output")] = (done.stdout + done.stderr).encode()
    found = [
        (path, name)
        for path, data in told.items()
        for name, secret in SECRETS.items()
        if secret.encode() in data
    ]
    assert found == []
