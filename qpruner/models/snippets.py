"""How the models that a run leaves are loaded, as their cards tell it: a section of Markdown for each form."""

from __future__ import annotations

import re
from typing import Literal

Form = Literal["packed", "peft", "merged", "merged and plain"]

PEFT_BASE = "base"
"""Folder of the quantized model inside a peft export."""

TITLE = "## Load it"
_SECTION = re.compile(rf"^{TITLE}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_NEEDED = (
    "Loading it takes the Python package `qpruner`: `pip install .` in a copy of its source, which whoever made this "
    "model has.\n"
)
_MERGED = "The weights here are dense, with the adapter merged in; the sizes told are those of the packed model."
_IMPORT = "import qpruner.hf  # registers the mixed-precision quantizer and blocks of different widths\n"
_TO_GPU = '  # with a GPU: add .to("cuda")'


def section(form: Form, place: str = "this folder") -> str:
    """Write the part of a card that says how the model is loaded.

    Args:
        form: `packed`: a final folder; `peft`: a peft export; `merged`: dense, blocks of different widths; `merged and
            plain`: dense, blocks alike, which transformers loads by itself.
        place: Its folder or repository.
    """
    merged = _MERGED if form.startswith("merged") else ""
    if form == "merged and plain":
        lead, ours = f"{merged} Plain transformers loads them.\n", ""
    else:
        lead, ours = f"{merged} {_NEEDED}".lstrip(), _IMPORT
    code = _peft(place) if form == "peft" else _plain(place)
    return f'{TITLE}\n\n{lead}\n```python\n{ours}{code}tokenizer = AutoTokenizer.from_pretrained("{place}")\n```\n'


def with_section(card: str, form: Form, place: str) -> str:
    """Change a run's card to that of a repository that has the model in this form."""
    return _SECTION.sub(lambda _: f"{section(form, place)}\n", card)


def _plain(place: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}"){_TO_GPU}\n'
    )


def _peft(place: str) -> str:
    """Load base and adapter from a local folder.

    From a repository, transformers (5.24) attaches the adapter itself and looks for its weights in the base's folder.
    """
    return (
        "from huggingface_hub import snapshot_download\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'folder = snapshot_download("{place}")\n'
        f'base = AutoModelForCausalLM.from_pretrained(f"{{folder}}/{PEFT_BASE}"){_TO_GPU}\n'
        "model = PeftModel.from_pretrained(base, folder)\n"
    )
