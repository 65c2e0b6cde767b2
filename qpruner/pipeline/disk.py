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
from qpruner.runs.object_store import CACHE, cache_root
from qpruner.runs.paths import BANK_CACHE, files_in
from qpruner.runs.records import Results

SMALL_FILES = 2**20
"""Bytes of records, log and report, which every command writes."""
OF_ROWS = ("finetune", "comparison")
"""Stages that leave their files in the folders of the final table's rows."""


def check_room(context: Context) -> None:
    """Refuse a disk that cannot hold the large files that a run has still to write, or at a URI this machine's copies.

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
        raise UserError(
            f"`output`: the run needs about {amount(needed)} more in {existing}, where {amount(free)} are free: "
            f"make room or name another folder{f' by {CACHE}' if context.run_dir.is_at_uri else ''}"
        )


def _sizes(context: Context) -> dict[str, int]:
    """About the bytes that each stage leaves on this machine."""
    wanted = [stage for stage in STAGES if stage.record and stage.is_wanted(context.config)]
    return dict.fromkeys(Results.model_fields, 0) | {stage.name: stage(context).disk_bytes() for stage in wanted}


def _left(context: Context, sizes: dict[str, int]) -> int:
    """Of these bytes those that are not on this machine yet; what stages share a folder is subtracted once."""
    shares, left = recorded(context), 0
    found = context.records
    for names in (*((name,) for name in sizes if name not in OF_ROWS), OF_ROWS):
        done = [name for name in names if shares[name]]
        if context.run_dir.is_at_uri:
            there = sum(files_in(_folder(context, names[0])).values()) if done else 0
            size = sum(sizes[name] for name in names if name not in done)
            size += min(there, sum(sizes[name] for name in done))
        else:
            size = sum(round(sizes[name] * (1 - shares[name])) for name in names)
        left += max(0, size - _bytes({file for name in names for file in _held(context, name, found)}))
    return left


def _folder(context: Context, stage: str) -> Path:
    """What a stage leaves its large files in."""
    return context.run_dir.candidates if stage in OF_ROWS else context.run_dir.stage(stage)


def _held(context: Context, stage: str, found: Results) -> Iterator[Path]:
    """Files on this machine that a stage need not write again, or writes over: what an attempt left that was killed."""
    run = context.run_dir
    places = [run.scratch_path(stage)]
    if run.is_at_uri or stage in OF_ROWS:
        places.append(_folder(context, stage))
    for folder, _, names in (step for place in places for step in os.walk(place)):
        yield from (Path(folder, name) for name in names)
    if run.is_at_uri and stage == "bank" and found.bank:
        copies = Path(os.environ.get(BANK_CACHE) or cache_root() / "bank")
        yield from (copies / f"{sha256}.safetensors" for sha256 in found.bank.files.values())


def _bytes(files: Iterable[Path]) -> int:
    """Of those that are there; another driver may be at work on them."""
    size = 0
    for file in files:
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size
