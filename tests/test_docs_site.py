"""The documentation as a site: it builds without a warning, names every key and verb, and needs no other host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from qpruner.cli.main import main
from qpruner.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
WHOLE = RunConfig.model_json_schema()
SECTIONS = {"RunConfig": WHOLE, **WHOLE["$defs"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # the theme's word on its own future is none on these pages
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_in_the_reference(section: str, site: Path) -> None:
    page = " ".join(text_of(site / "configuration.html").split())
    for name, field in SECTIONS[section].get("properties", {}).items():
        assert re.search(rf"\b{name}( \(|¶)", page), f"{section}.{name}"
        about = re.sub(r"\*(\w+)\*", r"\1", " ".join(field.get("description", "").replace("`", "").split()))
        assert about in page, f"{section}.{name} without its meaning"


def test_every_verb_is_in_the_reference(site: Path) -> None:
    page = text_of(site / "commands.html")
    for name, command in main.commands.items():
        assert re.search(rf"Usage: qpruner {name}\b", page)
        for parameter in command.params:
            assert all(option in page for option in parameter.opts if option.startswith("--"))


def test_no_page_needs_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?([^\"'\s>]+)", page.read_text())
        assert [place for place in loaded if re.match(r"(?:https?:)?//", place)] == [], page
