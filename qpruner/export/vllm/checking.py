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
from pathlib import Path
from typing import Any, Literal

import torch

from qpruner.errors import UserError
from qpruner.export.compare import MOST_DIVERGENCE, Compared, export_error, log_probabilities, loss_of
from qpruner.export.recode import ADAPTER_FILES
from qpruner.export.vllm import outside
from qpruner.export.vllm.writing import ADAPTER_FOLDER, needs_modeling
from qpruner.hf import load
from qpruner.models.loading import OnWork, checkpoint_config, device, ignore_progress

PYTHON = "QPRUNER_VLLM_PYTHON"
"""Environment variable with the Python of an environment that has vLLM."""
NAMES = {"vllm": "vLLM", "transformers": "transformers", "compressed_tensors": "compressed-tensors"}
INSTALL = 'run `pip install "qpruner[vllm]"`'
MOST_LOSS = math.log(1.01)
"""Largest allowed difference of the loss: 1 % of the perplexity."""
LEAST_EFFECT = 1
"""Smallest effect of an adapter that is checked, as a share of the error of the log-probabilities."""
CPU_BITS = 4
"""The only width that vLLM's CPU kernel takes (0.32)."""


Server = Literal["vllm", "transformers"]


def missing() -> str | None:
    """Say which package to install before an export for vLLM can be checked; None if there is one."""
    if _python_of_vllm() or importlib.util.find_spec("compressed_tensors"):
        return None
    return f"the package compressed-tensors is missing, without which the export cannot be checked: {INSTALL}"


def check(
    checkpoint: Path,
    exported: Path,
    samples: Sequence[Sequence[int]],
    on_progress: OnWork = ignore_progress,
    server: Server | None = None,
) -> Compared:
    """Compare an export's predictions with those of the checkpoint that it was made from, on rows of token ids.

    The export is loaded in a process of its own, without qpruner, by vLLM if it can; `server` chooses instead.

    Raises:
        StageError: If they differ by more than rounding does, or the export cannot be loaded.
        UserError: If a package is missing.
    """
    config = checkpoint_config(exported)
    server = server or ("vllm" if _vllm_takes(config) else "transformers")
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
    return _likeness(*_expected(checkpoint, samples, on_progress), found, samples, by)


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
            env=os.environ | {"TQDM_DISABLE": "1", "HF_MODULES_CACHE": folder},
        )
        if done.returncode:
            how = signal.Signals(-done.returncode).name if done.returncode < 0 else (done.stderr.strip() or "?")
            raise export_error(f"{asked['server']} cannot load it: {how.splitlines()[-1]}")
        with np.load(into) as arrays:
            versions = json.loads(str(arrays["versions"]))
            found = {name: torch.from_numpy(arrays[name]) for name in outside.Predictions._fields}
    return found, ", ".join(f"{NAMES[package]} {version}" for package, version in versions.items())


def _expected(
    checkpoint: Path, samples: Sequence[Sequence[int]], on_progress: OnWork
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the checkpoint's log-probabilities ``(tokens, vocabulary)``; and without its adapter if it has one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = load(checkpoint, on_progress).eval()
    if device() == "cpu":
        model = torch.nn.Module.float(model)  # as `outside.py`; transformers forbids it for packed layers, ours take it
    expected = log_probabilities(model, samples, on_progress)
    if not (checkpoint / ADAPTER_FILES[0]).is_file():
        return expected, None
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(False)
    return expected, log_probabilities(model, samples, on_progress)


def _likeness(
    expected: torch.Tensor,
    without: torch.Tensor | None,
    found: dict[str, torch.Tensor],
    samples: Sequence[Sequence[int]],
    by: str,
) -> Compared:
    """Compute the divergence over the likeliest tokens and the rest in sum, which is at most that over all tokens."""

    def inner(log_probabilities: torch.Tensor) -> torch.Tensor:
        rows = torch.split_with_sizes(log_probabilities, list(map(len, samples)))
        return torch.cat([row[:-1] for row in rows])

    ids, after = found["ids"], found["likeliest"].float()
    all_before = inner(expected)
    before = all_before.gather(1, ids)
    rest_before, rest_after = ((1 - each.exp().sum(-1)).clamp(min=1e-9) for each in (before, after))
    divergences = (before.exp() * (before - after)).sum(-1) + rest_before * (rest_before / rest_after).log()
    divergence, loss = float(divergences.mean()), -float(found["actual"].mean())
    if not divergence <= MOST_DIVERGENCE:
        raise export_error(f"predictions in {by} diverge by {divergence:.2g} nats per token")
    if without is not None:
        effect, error = before - inner(without).gather(1, ids), after - before
        share = 1 + float((error * effect).sum() / effect.square().sum())
        if effect.norm() > LEAST_EFFECT * error.norm() and not abs(share - 1) <= 0.25:
            raise export_error(f"{by} shows {share:.0%} of its adapter's effect")
    loss_before = loss_of(expected, samples)
    if not abs(loss - loss_before) <= MOST_LOSS:
        raise export_error(f"the loss in {by} is {loss:.4f} nats per token, not {loss_before:.4f}")
    agreement = (before[:, 0] == all_before.max(-1).values).float().mean()  # of two equal logits either may come first
    return Compared(divergence, float(agreement), len(before), loss_before, loss, by)


def _python_of_vllm() -> str | None:
    """Return the Python that has vLLM: this one, or the one in `QPRUNER_VLLM_PYTHON`; None if there is none."""
    found = importlib.util.find_spec("vllm")
    is_installed = found is not None and found.origin is not None  # not just a folder of this name
    return os.environ.get(PYTHON) or (sys.executable if is_installed else None)


def _vllm_takes(config: Any) -> bool:
    """Return True if there is vLLM, and it has kernels here for the widths of this model."""
    groups = (getattr(config, "quantization_config", None) or {}).get("config_groups", {})
    widths = {each["weights"]["num_bits"] for each in groups.values()}
    return _python_of_vllm() is not None and (torch.cuda.is_available() or widths <= {CPU_BITS})
