"""Whether this machine's disk can hold what a run has still to write; what it holds already is paid for."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from qpruner.errors import UserError
from qpruner.pipeline.context import Context
from qpruner.pipeline.flow import STAGES, recorded
from qpruner.pipeline.preflight import amount
from qpruner.runs.records import Results
from qpruner.runs.storage import CACHE

SMALL_FILES = 2**20
"""Bytes of records, log and report, which every command writes."""
OF_ROWS = ("finetune", "comparison")
"""Stages that leave their files in the folders of the final table's rows."""


def check_room(context: Context) -> tuple[int, int]:
    """Refuse a disk that cannot hold the large files that a run has still to write.

    Returns:
        About the bytes that are needed at most, and those that are free.

    Raises:
        UserError: Naming the bytes that are needed and those that are free.
    """
    folder = context.run_dir.root
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    wanted = [stage for stage in STAGES if stage.record and stage.is_wanted(context.config)]
    sizes = dict.fromkeys(Results.model_fields, 0) | {stage.name: stage(context).disk_bytes() for stage in wanted}
    free, needed = shutil.disk_usage(existing).free, SMALL_FILES + sum(sizes.values())
    if free < needed:  # what is recorded takes time to find out
        needed = SMALL_FILES + _left(context, sizes)
    if free < needed:
        other = "" if context.run_dir.storage.fills_this_disk else f" by {CACHE}"
        raise UserError(
            f"`output`: the run needs about {amount(needed)} more in {existing}, where {amount(free)} are free: "
            f"make room or name another folder{other}"
        )
    return needed, free


def _left(context: Context, sizes: dict[str, int]) -> int:
    """Count what of these bytes is not recorded yet, nor left by a killed attempt, which is used or written over."""
    shares, run, left = recorded(context), context.run_dir, 0
    for names in (*((name,) for name in sizes if name not in OF_ROWS), OF_ROWS):
        places = {run.scratch_path(name) for name in names} | ({run.candidates} if names == OF_ROWS else set())
        held = 0
        for file in (Path(folder, name) for place in places for folder, _, files in os.walk(place) for name in files):
            with suppress(FileNotFoundError):  # another driver may be at work
                held += file.stat().st_size
        left += max(0, sum(round(sizes[name] * (1 - shares[name])) for name in names) - held)
    return left
