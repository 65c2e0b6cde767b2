"""The page of formats, families and servers says what happens."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.serve
def test_the_page_shows_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "docs")])
    import served

    assert served.page(served.byte_tokenizer(tmp_path)) == served.PAGE.read_text(), (
        "run `python docs/served.py`"
    )
