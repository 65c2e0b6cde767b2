"""The parts of `gpu_7b.py`; several run one after the other in one process, without its time
limits.

    .venv/bin/python benchmarks/gpu_parts.py prune bank --shape tiny --work FOLDER

A part is a function of the setup that returns figures. It finds what it needs of earlier ones in
the work folder.
"""

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from gpu_estimates import estimates
from gpu_setup import PAD_ID, SHAPES, Figures, Laps, Setup
from gpu_training import peaks, throughput
from harness import append_record, command_line
from prune_7b import random_llama, tokenizer

from qpruner.data.calibration import Samples
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import device
from qpruner.models.memory import PeakMemory, freeze_libraries, release
from qpruner.plans.plan import UNPRUNED
from qpruner.pruning.prune import prune as prune_model
from qpruner.quantization.bank import EntryRecord, make_entries
from qpruner.runs.records import RungResult
from qpruner.runs.version import describe
from qpruner.search import trial
from qpruner.search.trial_records import Materials, TrialJob

ROOT = Path(__file__).resolve().parent.parent


def prune(setup: Setup) -> Figures:
    """Make the random model on the device, cut it as the stage does, save it."""
    aside = setup.work / "pruned.part"
    base = setup.base()
    calibration = setup.config.calibration
    for folder in (aside, setup.pruned, setup.bank):
        shutil.rmtree(folder, ignore_errors=True)
    shape = (calibration.num_samples, calibration.max_length)
    ids = torch.randint(
        3, base.vocab_size, shape, generator=torch.Generator().manual_seed(1)
    ).tolist()
    samples = Samples(
        [{"input_ids": row, "labels": row} for row in ids], PAD_ID, calibration.batch_size
    )
    figures: Figures = {}
    peak = PeakMemory()
    laps = Laps()

    model = random_llama(setup.base(), device())
    laps.end("build")
    pruned = prune_model(model, setup.config.prune, samples)
    laps.end("cut")
    figures.update(
        before=pruned.parameters_before, after=pruned.parameters_after, peak_bytes=peak.bytes()
    )
    save_checkpoint(pruned.model, tokenizer(), aside)
    laps.end("save")
    aside.rename(setup.pruned)
    return figures | laps.seconds


def bank(setup: Setup) -> Figures:
    """Pack every (group, format) with its LoftQ start."""
    made = list[EntryRecord]()
    peak = PeakMemory()
    laps = Laps()
    for name in setup.groups:
        made += [
            entry for entry, _ in make_entries(setup.source, name, setup.config.quantize.levels)
        ]
    laps.end("pack")
    size = sum(path.stat().st_size for path in setup.bank.rglob("*.safetensors"))
    left = statistics.mean(entry.residual_ratio for entry in made)
    return {
        "entries": len(made),
        "bank_bytes": size,
        "residual_ratio": left,
        "peak_bytes": peak.bytes(),
        **laps.seconds,
    }


def one_trial(setup: Setup) -> Figures:
    """Run a trial whose blocks are in two formats in turns.

    They are assembled, trained for 8 steps, and scored after 4 and after 8 steps.
    """
    rows = {"train": setup.train_rows, "validation": setup.validation_rows}
    # A trial reads its rows by datasets, whose pyarrow alone is most of what the kit may weigh.
    trial.load_encoded = lambda folder: rows[folder.name]  # type: ignore[attr-defined]
    losses = []
    peak = PeakMemory()
    laps = Laps()

    def report(result: RungResult, checkpoint: Path) -> None:
        losses.append(result.loss)
        laps.end(f"rung {len(losses)}")

    materials = Materials({UNPRUNED: setup.source}, setup.work)
    job = TrialJob(setup.config, materials, setup.plan(*setup.config.quantize.levels))
    trial.run_trial(job, None, report)
    first, second = laps.seconds.values()
    return {
        "start": first - second,
        "training_and_scoring": 2 * second,
        "peak_bytes": peak.bytes(),
        "losses": losses,
    }


def gpu_tests(setup: Setup) -> Figures:
    """The tests marked `gpu`; where there is no GPU they are only collected."""
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed here")
    marked = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += [] if torch.cuda.is_available() else ["--collect-only"]
    command = [sys.executable, "-m", "pytest", *options, *marked]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return {
        "summary": printed[-1],
        "failed": [line for line in printed if line.startswith(("FAILED", "ERROR "))],
    }


PARTS: dict[str, tuple[Callable[[Setup], Figures], str]] = {
    "prune": (prune, ""),
    "bank": (bank, "prune"),
    "trial": (one_trial, "bank"),
    "finetune": (throughput, "bank"),
    "memory": (peaks, "bank"),
    "estimates": (estimates, ""),
    "tests": (gpu_tests, ""),
}
"""Name -> the part, and the one whose result it needs."""


def run_part(name: str, setup: Setup, facts: Figures) -> None:
    """Print and append the part's line: its figures or its error, and facts of the machine."""
    part, needed = PARTS[name]
    started = time.monotonic()
    try:
        if needed and not (setup.pruned if needed == "prune" else setup.bank).exists():
            raise RuntimeError(
                f"{setup.work} has nothing of the part {needed} yet: run that one first"
            )
        figures = part(setup)
    except Exception as error:  # its text goes into the line, and the next part begins
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}"}
    line = {
        "part": name,
        "shape": setup.shape,
        "seconds": time.monotonic() - started,
        **figures,
        **facts,
    }
    append_record(setup.work / "results.jsonl", line)
    print(json.dumps(line), flush=True)
    release()


def about() -> Figures:
    """GPU, versions, commit."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if has_gpu else None,
        "cuda": torch.version.cuda,
        "versions": {
            name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")
        },
        "qpruner": describe(),
    }


def main() -> None:
    """Run the parts that are named, one after the other."""
    parser = command_line(__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.shape == "7b" and not torch.cuda.is_available():
        parser.error("`--shape 7b` needs a GPU, and torch sees none here: try `--shape tiny`")
    arguments.work.mkdir(parents=True, exist_ok=True)
    setup = SHAPES[arguments.shape](arguments.shape, arguments.work.absolute())
    freeze_libraries()  # as a worker does
    facts = about()  # before anything can leave the GPU in a state in which it answers no more
    for part in arguments.parts:
        run_part(part, setup, facts)


if __name__ == "__main__":
    main()
