"""Load an export for vLLM, and compare it with the checkpoint.

It is loaded by vLLM, or by transformers where vLLM cannot load it. vLLM computes in the type of the
model, which changes predictions by 0.7 to 1.3 times of what that type changes in transformers (tiny
random models of three families, vLLM 0.32 on a CPU, 2026-11-30).
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from qpruner.errors import UserError
from qpruner.export.compare import (
    TOP,
    Compared,
    Predictions,
    Rows,
    compare_served,
    export_error,
    in_its_type,
)
from qpruner.export.vllm import outside
from qpruner.export.vllm.writing import ADAPTER_FOLDER, needs_modeling
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress

PYTHON = "QPRUNER_VLLM_PYTHON"
"""Environment variable with the Python of an environment that has vLLM."""
NAMES = {"vllm": "vLLM", "transformers": "transformers", "compressed_tensors": "compressed-tensors"}
INSTALL = 'run `pip install "qpruner[vllm]"`'
CPU_BITS = 4  # the only width that vLLM's CPU kernel takes (0.32)

Server = Literal["vllm", "transformers"]


def missing() -> str | None:
    """Say which package to install before an export for vLLM can be checked.

    Return None if nothing is missing.
    """
    if _python_of_vllm() or importlib.util.find_spec("compressed_tensors"):
        return None
    return (
        "the package compressed-tensors is missing, without which the export cannot be checked: "
        f"{INSTALL}"
    )


def check(
    checkpoint: Path,
    exported: Path,
    rows: Rows,
    on_progress: OnWork = ignore_progress,
    server: Server | None = None,
) -> Compared:
    """Compare an export's predictions with those of the checkpoint that it was made from.

    The export is loaded in a process of its own, without qpruner.

    Args:
        checkpoint: The folder that the export was written from.
        exported: The folder of the export.
        rows: Rows of token ids.
        on_progress: Called before and after the export makes its predictions, and for each row
            that is compared.
        server: The program that loads the export. By default it is vLLM, if that is installed and
            has kernels for the export's bit-widths on this machine, and transformers otherwise.

    Raises:
        UserError: No package is installed that could load the export.
        StageError: The export cannot be loaded, or its predictions differ.
    """
    config = checkpoint_config(exported)
    server = server or ("vllm" if _vllm_takes(config) else "transformers")
    if server == "transformers" and getattr(config, "quantization_config", None):
        reason = missing()
        if reason:
            raise UserError(reason)
    adapter = exported / ADAPTER_FOLDER
    request = {
        "server": server,
        "folder": str(exported),
        "adapter": str(adapter) if adapter.is_dir() else None,
        "rows": [list(map(int, row)) for row in rows],
        "trust": needs_modeling(config),
        "count": TOP,
    }
    on_progress(f"checking in {server}", 0, 1)
    predictions, programs = _predictions(server, request)
    on_progress(f"checking in {server}", 1, 1)
    return compare_served(checkpoint, rows, predictions, programs, in_its_type, on_progress)


def _predictions(server: Server, request: dict[str, Any]) -> tuple[list[Predictions], str]:
    """Run `outside.py`, and return its predictions for each row.

    The second value names the programs that made them, with their versions.
    """
    vllm_python = _python_of_vllm() if server == "vllm" else None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "predictions.json"
        ended = subprocess.run(  # noqa: S603
            [vllm_python or sys.executable, "-P", outside.__file__],
            input=json.dumps(request | {"into": str(file)}),
            capture_output=True,
            text=True,
            env=os.environ | {"TQDM_DISABLE": "1", "HF_MODULES_CACHE": folder},
        )
        if ended.returncode:
            raise export_error(f"{server} cannot load it: {_cause(ended)}")
        answer = json.loads(file.read_text(encoding="utf-8"))
    predictions = [Predictions(*map(np.array, row)) for row in answer["rows"]]
    programs = [f"{NAMES[package]} {version}" for package, version in answer["versions"].items()]
    return predictions, ", ".join(programs)


def _cause(ended: subprocess.CompletedProcess[str]) -> str:
    """Return the line of a failed program's output that names its error."""
    if ended.returncode < 0:
        return signal.Signals(-ended.returncode).name
    lines = ended.stderr.strip().splitlines() or ["?"]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception):", line)]
    return (errors or lines)[-1]  # warnings may follow the error


def _python_of_vllm() -> str | None:
    """Return the Python that has vLLM: the one in `QPRUNER_VLLM_PYTHON`, or this one.

    Return None if there is none.
    """
    named = os.environ.get(PYTHON)
    if named:
        _check_python(named)
        return named
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # only a folder of this name has no origin
        return None
    return sys.executable


@cache
def _check_python(named: str) -> None:
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        subprocess.run([named, "-P", "-c", look], check=True, capture_output=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"`{PYTHON}` must be a Python that has vLLM, got {named}: name another, or unset it"
        ) from error


def _vllm_takes(config: Any) -> bool:
    """Return True if there is vLLM, and it has kernels here for the widths of this model."""
    if _python_of_vllm() is None:
        return False
    if torch.cuda.is_available():
        return True
    quantization = getattr(config, "quantization_config", None) or {}
    groups = quantization.get("config_groups", {}).values()
    return all(group["weights"]["num_bits"] == CPU_BITS for group in groups)
