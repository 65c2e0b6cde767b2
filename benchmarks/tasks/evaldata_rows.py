"""Reads rows of ../shared/evaldata for the task file beside this one."""

from pathlib import Path
from typing import Any

HUB = Path(__file__).resolve().parents[3] / "shared" / "evaldata" / "hub"


def load(files: dict[str, str], **_: Any) -> Any:
    """The named files as the splits of one data set; lm-eval passes the task's metadata along,
    which is not needed."""
    import datasets

    return datasets.DatasetDict(
        {name: datasets.Dataset.from_json(str(HUB / path)) for name, path in files.items()}
    )
