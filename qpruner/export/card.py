"""Read the metadata of a model card, and write the card's section on loading the model."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from qpruner.hf import PEFT_BASE

Form = Literal["packed", "peft", "merged", "merged and plain", "merged with code"]
"""The final folder, a peft export, and merged models that need qpruner, nothing, or the file beside
the weights."""
STATED = {"base_model": "base model", "license": "licence", "datasets": "datasets"}
"""Keys of a card's metadata and of the configuration section `card`, with their names in messages.
"""
TITLE = "## Load it"
_SECTION = re.compile(rf"^{TITLE}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_NEEDS_US = (
    "To load it, install the Python package `qpruner`: run `pip install .` in a copy of its "
    "source, which you get from "
    "the maker of this model.\n"
)
_MERGED = (
    "The weights here are dense, with the adapter merged in; the sizes stated are those of the "
    "packed model."
)
_CODE_BESIDE = (
    "Plain transformers loads them. Blocks have different widths: `modeling_ragged.py` beside the "
    "weights builds them, "
    "about thirty lines to read before you let transformers run them by `trust_remote_code=True`.\n"
)
_IMPORT = (
    "import qpruner.hf  # registers the mixed-precision quantizer and blocks of different widths\n"
)
_ON_GPU = '  # with a GPU: add .to("cuda")'
_CODE = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{place}}"{{options}}){_ON_GPU}
"""
# Base and adapter are loaded from a local folder: from a repository transformers 5.24 would attach
# the adapter by itself and look for its weights in the folder of the base model.
_PEFT_CODE = f"""from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = snapshot_download("{{place}}")
base = AutoModelForCausalLM.from_pretrained(f"{{{{folder}}}}/{PEFT_BASE}"){_ON_GPU}
model = PeftModel.from_pretrained(base, folder)
"""


def front_matter(card: str) -> dict[str, Any]:
    """Read the YAML metadata of a card; return an empty dictionary if it has none that is valid."""
    block = REGEX_YAML_BLOCK.search(card.removeprefix("\N{BOM}"))
    try:
        metadata = yaml.safe_load(block[2]) if block else None
    except yaml.YAMLError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {}


def missing_keys(card: str) -> tuple[str, ...]:
    """List the keys of `STATED` that the metadata of a card does not have."""
    metadata = front_matter(card)
    return tuple(key for key in STATED if metadata.get(key) is None)


def missing_remark(keys: Sequence[str]) -> str | None:
    """Name the missing metadata and the configuration keys to set.

    Return None if `keys` is empty.
    """
    if not keys:
        return None
    names = ", ".join(STATED[key] for key in keys)
    stated_by = ", ".join(f"`card.{key}`" for key in keys)
    return (
        f"the model card does not state: {names}; set {stated_by} and repeat `qpruner run`, "
        "which rewrites the card"
    )


def loading_section(form: Form, place: str = "this folder") -> str:
    """Return a card's section with the code that loads the model from a folder or repository."""
    if form == "merged and plain":
        lead = f"{_MERGED} Plain transformers loads them.\n"
    elif form == "merged with code":
        lead = f"{_MERGED} {_CODE_BESIDE}"
    elif form == "merged":
        lead = f"{_MERGED} {_NEEDS_US}"
    else:
        lead = _NEEDS_US
    imports = _IMPORT if lead.endswith(_NEEDS_US) else ""
    template = _PEFT_CODE if form == "peft" else _CODE
    options = ", trust_remote_code=True" if form == "merged with code" else ""
    code = template.format(place=place, options=options)
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
    return f"{TITLE}\n\n{lead}\n```python\n{imports}{code}{tokenizer}```\n"


def with_loading_section(card: str, form: Form, place: str) -> str:
    """Replace a card's section on loading the model.

    Args:
        card: The text of the card.
        form: The form in which the model is uploaded.
        place: The repository that it is loaded from.
    """
    return _SECTION.sub(lambda _: f"{loading_section(form, place)}\n", card)
