"""Compares what two commits compute: the same configuration and seed must give the same cut, bank,
plans and losses.

    .venv/bin/python benchmarks/same_results.py OLD [NEW] [--config CONFIG] [--set KEY=VALUE ...]

Each commit is checked out into a folder of its own and runs the configuration there, one trial at a
time, with this Python. Every tensor of the run and every number of its records is compared bit by
bit; times, memory, digests, paths and words are not. Prints what differs, then counts. Exits 1
where a number or tensor of both differs.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from harness import command_line
from safetensors.torch import load_file

RECIPE = "tune_configs/demo_smollm2_cpu.yaml"
SMALL = (
    "prune.units=[attention,mlp]",
    "calibration.num_samples=16",
    "calibration.num_sensitivity_samples=32",
    "sensitivity.methods=[mutual_information,first_order]",
    "search.max_concurrent=1",
    "search.max_trials=8",
    "search.steps=4",
    "search.first_rung=2",
    "search.confirm=2",
    "finetune.steps=4",
    "finetune.compare=false",
    "evaluate.limit=8",
)
"""The recipe in some minutes."""
VARIES = (
    "seconds",
    "hours",
    "memory",
    "tokens_per",
    "bytes_free",
    "speed",
    "started",
    "pid",
    "time",
    "version",
    "commit",
)
"""Parts of the names of numbers that differ from run to run."""
RENAMED = (
    (r"^search\.confirmations\[", "search.finalists["),
    # Means over several training seeds are no longer recorded, but the loss under each seed is.
    (
        r"^(search\.finalists\[\d+\])\.seed_losses\[(\d+)\]",
        r"\1.fine_tunes[\2].losses.selection.mean",
    ),
    (r"^(search\.finalists\[\d+\])\.loss$", r"\1.fine_tunes[0].losses.selection.mean"),
    (r"^(search\.finalists\[\d+\])\.losses\[", r"\1.fine_tunes[0].losses.selection.by_row["),
    (r"^(search\.finalists\[\d+\])\.(accuracy|plan)", r"\1.fine_tunes[0].\2"),
    (r"^finetune\.candidates\[0\]", "finetune.winner"),
    (r"^comparison\.candidates\[", "comparison.rows["),
    (r"\.confirmation_loss$", ".losses.confirmation.mean"),
    (r"\.confirmation_losses\[", ".losses.confirmation.by_row["),
    (r"^(evaluate|comparison)\.(rows\[\d+\])\.scores\[", r"\1.\2.tasks["),
)
"""Names in records of earlier commits, as patterns, and the names that they have now."""


def run(commit: str, place: Path, config: str, overrides: list[str]) -> Path:
    """Run a commit's code in a checkout of its own; return its run folder, which is reused if
    `place` has it."""
    parsed = subprocess.run(
        ["git", "rev-parse", commit],  # noqa: S607
        check=True,
        capture_output=True,
        text=True,
    )
    folder = place / parsed.stdout.strip()
    code = folder / "code"
    output = folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    if output.exists():
        return output
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(code), commit], check=True)  # noqa: S607
    try:
        options = [part for each in [*overrides, f"output={output}"] for part in ("--set", each)]
        command = [sys.executable, "-m", "qpruner", "run", config, "--quiet", *options]
        subprocess.run(command, cwd=code, env=os.environ | {"PYTHONPATH": str(code)}, check=True)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(code)], check=True)  # noqa: S607
    return output


def tensors(run: Path) -> dict[str, str]:
    """Map stage, file and tensor to the digest of the tensor's bytes.

    Folders that are named by digests count by their order.
    """
    found: dict[str, str] = {}
    for stage in ("cuts", "bank", "banks", "final"):
        for file in sorted((run / stage).rglob("*.safetensors")):
            for key, tensor in load_file(file).items():
                digest = hashlib.sha256(
                    tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                ).hexdigest()
                found[f"{file.relative_to(run)}:{key}"] = digest
    return found


def numbers(run: Path) -> dict[str, Any]:
    """Numbers and plans of all records, by stage or trial and path of keys."""
    files = {path.stem: path for path in sorted((run / "records").glob("*.json"))}
    files |= {path.parent.name: path for path in sorted((run / "trials").glob("*/*/trial.json"))}
    found: dict[str, Any] = {}
    for name, file in files.items():
        _flatten(json.loads(file.read_text()), name, found)
    return {renamed(path, found): number for path, number in found.items()}


def renamed(path: str, found: dict[str, Any]) -> str:
    """Return the present name of a number; `found` has the numbers of the run."""
    finalist = re.match(r"search\.confirmations\[\d+\]", path)
    if finalist and f"{finalist[0]}.seed_losses[0]" in found:
        field = path.removeprefix(finalist[0])
        if re.match(r"\.(loss|losses|accuracy|accuracy_stderr)\b", field):
            return path
    for pattern, name in RENAMED:
        path = re.sub(pattern, name, path)
    return path


def _flatten(value: Any, path: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not any(part in key for part in VARIES):
                _flatten(item, f"{path}.{key}", found)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _flatten(item, f"{path}[{index}]", found)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found[path] = value


def compare(kind: str, old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print what differs and counts by stage; returns how many of both differ."""
    both = old.keys() & new.keys()
    different = sorted(key for key in both if old[key] != new[key])
    for key in different[:20]:
        print(f"differs: {key}: {old[key]} -> {new[key]}")
    for name, mine, other in (("only old", old, new), ("only new", new, old)):
        for key in sorted(mine.keys() - other.keys())[:20]:
            print(f"{name}: {key}")
    stages = Counter(key.split(".")[0].split("/")[0] for key in both)
    print(
        f"{kind}: {len(both) - len(different)} of {len(both)} equal "
        f"({dict(sorted(stages.items()))})"
    )
    return len(different)


def main() -> None:
    parser = command_line(__doc__, overrides=True)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--config", default=RECIPE)
    parser.add_argument(
        "--keep", type=Path, help="where the runs stay; a temporary folder without it"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = asked.keep or Path(temporary)
        overrides = [*SMALL, *asked.overrides]
        old = run(asked.old, place, asked.config, overrides)
        new = run(asked.new, place, asked.config, overrides)
        different = compare("tensors", tensors(old), tensors(new))
        different += compare("numbers", numbers(old), numbers(new))
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
