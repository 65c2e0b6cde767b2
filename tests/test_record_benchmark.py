"""The table of record: which rows it shows, what they are compared with, and who wins."""

import sys
from pathlib import Path

import pytest
from conftest import Raw

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))


def measured(row: str, num_bytes: int, loss: float, seed: int) -> Raw:
    return {
        "row": row,
        "seed": seed,
        "bytes": num_bytes,
        "peak_memory_bytes": 10**9,
        "seconds": {"search": 60.0, "finetune": 30.0, "packing": 30.0},
        "losses": {"confirmation": [loss, loss + 0.1 + 0.001 * seed], "c4": [3.0, 3.2]},
        "correct": {"arc_easy acc_norm": [1.0, 0.0], "piqa acc_norm": [1.0, 1.0]},
        "served_by": "transformers",
        "prefill": 100.0,
        "decode": 10.0,
    }


def test_rows_are_compared_with_ours_of_as_many_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    import record

    sizes = {
        "q4_0": (92, 2.0),
        "ours-91.7": (91, 2.1),
        "ours-60": (60, 2.5),
        "nf4": (125, 1.9),
        "ours-112.1": (112, 1.7),
    }
    lines = [
        measured(name, size, loss, seed)
        for name, (size, loss) in sizes.items()
        for seed in record.SEEDS
    ]
    record.table([*lines, measured("dense", 270, 1.6, 1)])  # two of its seeds are not measured yet
    shown, compared = (
        [line.split(" | ") for line in part.split("\n")]
        for part in capsys.readouterr().out.split("\n\n")
    )
    # all rows as the heading; the rule below it has no spaces
    assert len({len(row) for row in shown}) == 2
    rows = [row[0].removeprefix("| ").partition(":")[0] for row in shown[2:]]
    assert rows == ["ours-60", "ours-91.7", "q4_0", "ours-112.1", "nf4"]
    assert [(row[0], row[1], row[-1]) for row in compared[2:] if row[0]] == [
        ("| q4_0", "ours-91.7", "this row: confirmation |"),
        ("| nf4", "ours-112.1", "ours: confirmation |"),
    ]
