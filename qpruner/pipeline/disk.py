"""Whether this machine's disk can hold what a run has still to write; what it holds already is paid for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from qpruner.errors import UserError
from qpruner.pipeline.context import Context
from qpruner.pipeline.flow import STAGES, recorded
from qpruner.pipeline.preflight import amount
from qpruner.runs.records import Results
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import CACHE, cache_root, files_in

SMALL_FILES = 2**20
"""Bytes of records, log and report, which every command writes."""
OF_ROWS = ("finetune", "comparison")
"""Stages that leave their files in the folders of the final table's rows."""


def check_room(context: Context) -> tuple[int, int]:
    """Refuse a disk that cannot hold the large files that a run has still to write, or at a URI this machine's copies.

    Returns:
        About the bytes that are needed at most, and those that are free.

    Raises:
        UserError: Naming the bytes that are needed and those that are free.
    """
    folder = context.run_dir.root
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, sizes = shutil.disk_usage(existing).free, _sizes(context)
    needed = SMALL_FILES + sum(sizes.values())
    if free < needed:  # what is recorded takes time to find out
        needed = SMALL_FILES + _left(context, sizes)
    if free < needed:
        other = "" if context.run_dir.storage.fills_this_disk else f" by {CACHE}"
        raise UserError(
            f"`output`: the run needs about {amount(needed)} more in {existing}, where {amount(free)} are free: "
            f"make room or name another folder{other}"
        )
    return needed, free


def _sizes(context: Context) -> dict[str, int]:
    """About the bytes that each stage leaves on this machine."""
    wanted = [stage for stage in STAGES if stage.record and stage.is_wanted(context.config)]
    return dict.fromkeys(Results.model_fields, 0) | {stage.name: stage(context).disk_bytes() for stage in wanted}


def _left(context: Context, sizes: dict[str, int]) -> int:
    """Count what of these bytes this machine has still to write or to copy; stages that share a folder count once."""
    shares, left = recorded(context), 0
    for names in (*((name,) for name in sizes if name not in OF_ROWS), OF_ROWS):
        to_write = sum(round(sizes[name] * (1 - shares[name])) for name in names)
        left += max(0, to_write - _bytes({file for name in names for file in _attempts(context, name)}))
        if done := [name for name in names if shares[name]]:
            copied = _bytes(_bank_copies(context.records)) if "bank" in names else 0
            to_copy = _bytes_to_copy(_folder(context, names[0])) - copied
            left += max(0, min(to_copy, sum(sizes[name] for name in done)))
    return left


def _folder(context: Context, stage: str) -> Path:
    """Name the folder of a stage's large files."""
    return context.run_dir.candidates if stage in OF_ROWS else context.run_dir.stage(stage)


def _attempts(context: Context, stage: str) -> Iterator[Path]:
    """List what a killed attempt left on this machine, which the stage uses or writes over."""
    places = [context.run_dir.scratch_path(stage), *([_folder(context, stage)] if stage in OF_ROWS else [])]
    for folder, _, names in (step for place in places for step in os.walk(place)):
        yield from (Path(folder, name) for name in names)


def _bank_copies(found: Results) -> Iterator[Path]:
    """Name this machine's copies of the bank's files."""
    copies = Path(os.environ.get(BANK_CACHE) or cache_root() / "bank")
    yield from (copies / f"{sha256}.safetensors" for sha256 in (found.bank.files.values() if found.bank else ()))


def _bytes_to_copy(folder: Path) -> int:
    """Count what this machine has still to fetch of a folder; of one that is used in place nothing."""
    return max(0, sum(files_in(folder).values()) - _bytes(file for file in folder.rglob("*") if file.is_file()))


def _bytes(files: Iterable[Path]) -> int:
    """Of those that are there; another driver may be at work on them."""
    size = 0
    for file in files:
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size
