"""Load an export for vLLM with vLLM, or with transformers where vLLM cannot, and compare it with the checkpoint."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpruner.errors import UserError
from qpruner.export.compare import MOST_DIVERGENCE, Likeness, export_error
from qpruner.export.vllm import outside
from qpruner.export.vllm.writing import ADAPTER_FOLDER, needs_modeling
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress

PYTHON = "QPRUNER_VLLM_PYTHON"
"""Environment variable with the Python of an environment that has vLLM."""
NAMES = {"vllm": "vLLM", "transformers": "transformers", "compressed_tensors": "compressed-tensors"}
INSTALL = 'run `pip install "qpruner[vllm]"`'
MOST_LOSS = math.log(1.01)
"""Largest allowed difference of the loss: 1 % of the perplexity."""
CPU_BITS = 4
"""The only width that vLLM's CPU kernel takes (0.32)."""


@dataclass(frozen=True)
class Checked(Likeness):
    """How like the export is in the program `by`, and its loss there in nats a token."""

    by: str
    loss: float


def missing() -> str | None:
    """Say which package to install before an export for vLLM can be checked; None if there is one."""
    if _python_of_vllm() or importlib.util.find_spec("compressed_tensors"):
        return None
    return f"the package compressed-tensors is missing, without which the export cannot be checked: {INSTALL}"


def check(
    exported: Path, expected: torch.Tensor, samples: Sequence[Sequence[int]], on_progress: OnWork = ignore_progress
) -> Checked:
    """Compare an export's predictions with the log-probabilities of the checkpoint it was made from.

    Args:
        exported: The folder, which is loaded in a process of its own, without qpruner.
        expected: ``(tokens, vocabulary)``, for all rows behind one another, as `compare.log_probabilities` gives them.
        samples: Token ids of each row.
        on_progress: Called after each row.

    Raises:
        StageError: If they differ by more than rounding does, or the export cannot be loaded.
    """
    config = checkpoint_config(exported)
    server = "vllm" if _vllm_takes(config) else "transformers"
    if server == "transformers" and getattr(config, "quantization_config", None) and (reason := missing()):
        raise UserError(reason)
    on_progress(f"checking in {server}", 0, 1)
    adapter = exported / ADAPTER_FOLDER
    asked: dict[str, Any] = {
        "server": server,
        "folder": str(exported),
        "adapter": str(adapter) if adapter.is_dir() else None,
    }
    asked |= {"samples": [list(map(int, sample)) for sample in samples], "trust_remote_code": needs_modeling(config)}
    found, by = _predictions(asked)
    on_progress(f"checking in {server}", 1, 1)
    return _likeness(expected, found, samples, by)


def _predictions(asked: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """Run `outside.py`; return its arrays, and the programs that computed them with their versions."""
    import numpy as np

    python = (_python_of_vllm() if asked["server"] == "vllm" else None) or sys.executable
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "predictions.npz"
        done = subprocess.run(  # noqa: S603
            [python, "-P", outside.__file__],
            input=json.dumps(asked | {"into": str(into)}),
            capture_output=True,
            text=True,
            env=os.environ | {"TQDM_DISABLE": "1"},
        )
        if done.returncode:
            how = signal.Signals(-done.returncode).name if done.returncode < 0 else (done.stderr.strip() or "?")
            raise export_error(f"{asked['server']} cannot load it: {how.splitlines()[-1]}")
        with np.load(into) as arrays:
            versions = json.loads(str(arrays["versions"]))
            found = {name: torch.from_numpy(arrays[name]) for name in outside.Predictions._fields}
    return found, ", ".join(f"{NAMES[package]} {version}" for package, version in versions.items())


def _likeness(
    expected: torch.Tensor, found: dict[str, torch.Tensor], samples: Sequence[Sequence[int]], by: str
) -> Checked:
    """Compute the divergence over the likeliest tokens and the rest in sum, which is at most that over all tokens."""
    before = torch.cat([each[:-1] for each in torch.split_with_sizes(expected, list(map(len, samples)))])
    ids, after = found["ids"], found["likeliest"].float()
    known = before.gather(1, ids)
    rest_before, rest_after = ((1 - each.exp().sum(-1)).clamp(min=1e-9) for each in (known, after))
    divergences = (known.exp() * (known - after)).sum(-1) + rest_before * (rest_before / rest_after).log()
    divergence, loss = float(divergences.mean()), -float(found["actual"].mean())
    if not divergence <= MOST_DIVERGENCE:
        raise export_error(f"predictions in {by} diverge by {divergence:.2g} nats per token")
    expected_loss = loss_of(expected, samples)
    if not abs(loss - expected_loss) <= MOST_LOSS:
        raise export_error(f"the loss in {by} is {loss:.4f} nats per token, not {expected_loss:.4f}")
    agreement = (before.argmax(-1) == ids[:, 0]).float().mean()
    return Checked(divergence, float(agreement), len(before), by, loss)


def loss_of(log_probabilities: torch.Tensor, samples: Sequence[Sequence[int]]) -> float:
    """Compute the mean loss of the tokens that follow, from ``(tokens, vocabulary)`` of all rows."""
    parts = zip(torch.split_with_sizes(log_probabilities, list(map(len, samples))), samples, strict=True)
    losses = [-part[:-1].gather(1, torch.tensor(sample[1:])[:, None]) for part, sample in parts]
    return float(torch.cat(losses).mean())


def _python_of_vllm() -> str | None:
    """Return the Python that has vLLM: this one, or the one in `QPRUNER_VLLM_PYTHON`; None if there is none."""
    return os.environ.get(PYTHON) or (sys.executable if importlib.util.find_spec("vllm") else None)


def _vllm_takes(config: Any) -> bool:
    """Return True if there is vLLM, and it has kernels here for the widths of this model."""
    groups = (getattr(config, "quantization_config", None) or {}).get("config_groups", {})
    widths = {each["weights"]["num_bits"] for each in groups.values()}
    return _python_of_vllm() is not None and (torch.cuda.is_available() or widths <= {CPU_BITS})
