"""Numbers as people read them."""

from __future__ import annotations

import pytest

from qpruner.wording import counted


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1.0, "1 row"), (0.5, "0.5 rows"), (2_500_000, "2500000 rows")],
)
def test_one_is_one_and_all_others_are_many(number: float, said: str) -> None:
    assert counted(number, "row") == said
