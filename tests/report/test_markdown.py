"""`report.md` and the model card as a Markdown renderer reads them."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from qpruner.report.markdown import pipe_table, prose

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(markup: str) -> str:
    """The text that a reader sees of a paragraph; fails where anything in it is an element but words of code."""
    found = re.fullmatch(r"<p>(.*)</p>\n", MARKDOWN.render(markup), re.DOTALL)
    assert found, MARKDOWN.render(markup)
    return html.unescape(re.sub(r"</?code>", "`", found[1]))


@pytest.mark.parametrize(
    "text",
    [
        "my_model_name* and *another*",
        "_x_, __init__ and a_b_",
        "`search.max_trials`, `**/*.py_` and a ` alone",
        "`` two ` of `` them",
        "[a](b) ![c](d) <b>e</b> &lt; a\\*b\\",
        "~~gone~~",
        *("- a", "+ a", "* a", "1. a", "2) a", "# a", "> a", "---", "***", "```", "-"),
    ],
)
def test_what_a_configuration_names_is_text_and_no_markup(text: str) -> None:
    assert shown(prose(text)) == text


def test_lines_are_one_paragraph_and_words_in_backticks_code() -> None:
    assert shown(prose("it failed:\n# why\n- so\n\n    and so")) == "it failed: # why - so      and so"
    assert MARKDOWN.render(prose("set `finetune.compare`")) == "<p>set <code>finetune.compare</code></p>\n"


def test_no_text_in_a_table_ends_its_cell_or_is_markup() -> None:
    texts = ("a|b", "*c*\nd", "`e|f`", "<i>g</i>", "-", "0.5")
    rendered = MARKDOWN.render(pipe_table(texts, [texts]))
    for tag in ("th", "td"):
        cells = re.findall(f"<{tag}>(.*?)</{tag}>", rendered)
        plain = [html.unescape(re.sub("</?code>", "`", cell)) for cell in cells]
        assert plain == [text.replace("\n", " ") for text in texts]
    assert "| - | 0.5 |" in pipe_table(texts, [texts]), "nothing is escaped without need"
