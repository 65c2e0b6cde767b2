"""Read and write what a model card states: its metadata, and how the model is loaded in each form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from qpruner.hf import PEFT_BASE

Form = Literal["packed", "peft", "merged", "merged and plain"]
"""A final folder; a peft export; a dense model with blocks of different widths, or one that transformers loads."""

STATED = {"base_model": "base model", "license": "licence", "datasets": "datasets"}
"""Keys of the card and of the configuration's section `card`, and their names for people."""
TITLE = "## Load it"
_SECTION = re.compile(rf"^{TITLE}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_NEEDS_US = (
    "Loading it takes the Python package `qpruner`: `pip install .` in a copy of its source, which whoever made this "
    "model has.\n"
)
_MERGED = "The weights here are dense, with the adapter merged in; the sizes stated are those of the packed model."
_IMPORT = "import qpruner.hf  # registers the mixed-precision quantizer and blocks of different widths\n"
_CODE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")  # with a GPU: add .to("cuda")
"""
# Base and adapter from a local folder: of a repository, transformers (5.24) attaches the adapter by itself, and looks
# for its weights in the base's folder.
_PEFT_CODE = f"""from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = snapshot_download("{{place}}")
base = AutoModelForCausalLM.from_pretrained(f"{{{{folder}}}}/{PEFT_BASE}")  # with a GPU: add .to("cuda")
model = PeftModel.from_pretrained(base, folder)
"""


def front_matter(card: str) -> dict[str, Any]:
    """Read the metadata of a card; empty if it has none or they cannot be read."""
    block = REGEX_YAML_BLOCK.search(card.removeprefix("\N{BOM}"))
    try:
        metadata = yaml.safe_load(block[2]) if block else None
    except yaml.YAMLError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {}


def missing_keys(card: str) -> tuple[str, ...]:
    """List the keys of `STATED` that a card does not have."""
    metadata = front_matter(card)
    return tuple(key for key in STATED if metadata.get(key) is None)


def missing_remark(keys: Sequence[str]) -> str | None:
    """Say what a card lacks and which configuration keys state it; None if nothing is missing."""
    if not keys:
        return None
    names, stated_by = ", ".join(STATED[key] for key in keys), ", ".join(f"`card.{key}`" for key in keys)
    return f"the model card does not state: {names}; set {stated_by} and repeat `qpruner run`, which writes it anew"


def loading_section(form: Form, place: str = "this folder") -> str:
    """Write the part of a card that says how the model is loaded from a folder or repository."""
    merged = _MERGED if form.startswith("merged") else ""
    if form == "merged and plain":
        lead, imports = f"{merged} Plain transformers loads them.\n", ""
    else:
        lead, imports = f"{merged} {_NEEDS_US}".lstrip(), _IMPORT
    code = (_PEFT_CODE if form == "peft" else _CODE).format(place=place)
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
    return f"{TITLE}\n\n{lead}\n```python\n{imports}{code}{tokenizer}```\n"


def with_loading_section(card: str, form: Form, place: str) -> str:
    """Replace a card's section on loading by that of a form and its repository."""
    return _SECTION.sub(lambda _: f"{loading_section(form, place)}\n", card)
