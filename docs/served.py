"""Writes `served_table.md`, which server takes which format and family: `python docs/served.py` (minutes).

Each cell is an export of a tiny random model with an adapter, loaded again and compared. vLLM itself loads what it can
if another environment has it (`QPRUNER_VLLM_PYTHON`, see `launch/serve_tests.sh`), else transformers does.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent / "tests" / each) for each in ("", "export", "models")]

from final_models import pruned_model, run_of  # noqa: E402

from qpruner.errors import StageError, UserError  # noqa: E402
from qpruner.export.forms import Form, export  # noqa: E402
from qpruner.quantization.formats import DENSE, formats  # noqa: E402
from qpruner.runs.run_dir import RunDir  # noqa: E402

PAGE = FOLDER / "served_table.md"
HEAD = """# Formats, families and servers

<!-- Made by `python docs/served.py`: each cell is an export of a tiny model that the server has loaded again. -->

Every cell was tried: a tiny random model with an adapter was exported, loaded again by the programs that are named, and
compared with the model in transformers. `yes`: with the packed weights as they are. A format: the server has no such
format, and the layers get this one. `no`: refused, before anything is written. `not alike enough`: written, and refused
when it was compared.
"""
FORMS: dict[Form, str] = {"gguf": "`--to gguf`", "vllm": "`--to vllm`"}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "olmo2", "phi3")
TRIED: dict[Form, str] = {"gguf": "q4_0", "vllm": "w4_g32"}
"""The format in which every family is tried."""
ALIKE, RAGGED, BIASED = "alike", "of different widths", "of different widths, with biases (`compensation: bias`)"
GEMMA_2 = {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
"""As in real ones: llama.cpp loads no Gemma 2 without a sliding window."""
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""Sizes that the k-quants take."""


def page(tokenizer: Path) -> str:
    """Try everything, and return the page."""
    # Formats that differ in their codes, not in their layout, are one row.
    names = [name for name, each in formats().items() if name != DENSE and not name.endswith(("_hqq", "_double"))]
    of_formats = [(name, *(tried("llama", ALIKE, name, form, tokenizer) for form in FORMS)) for name in names]
    of_families = [
        (name, blocks, *(tried(name, blocks, TRIED[form], form, tokenizer) for form in FORMS))
        for name in FAMILIES
        for blocks in (ALIKE, RAGGED, BIASED)
    ]
    return "\n".join(
        [
            HEAD,
            f"## Formats, in a Llama\n\n{_table(('format', *FORMS.values()), of_formats)}\n",
            f"## Families, in {' and '.join(TRIED.values())}\n\n"
            f"{_table(('family', 'blocks', *FORMS.values()), of_families)}\n",
        ]
    )


def tried(family: str, blocks: str, name: str, form: Form, tokenizer: Path) -> str:
    """Export a model of a family in one format, and say what came of it."""
    sizes = (WIDE if name.endswith("_k") else {}) | (GEMMA_2 if family == "gemma2" else {})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        try:
            place, is_ragged = Path(folder) / "pruned", blocks != ALIKE
            pruned = pruned_model(family, tokenizer, place, is_ragged, blocks == BIASED, **sizes)
        except (AttributeError, KeyError):  # a family whose blocks are built of other layers
            return "-"
        run_of(pruned, root, (name,))
        try:
            done = export(RunDir(root), form, root / "out")
        except UserError as error:
            return f"no: {_reason(str(error))}"
        except StageError as error:
            return f"not alike enough: {error.cause}"
    became = ", ".join(f"`{each}`" for each in sorted(set(done.recoded.values())))
    return f"{became or 'yes'} ({_programs(done.by)})"


def _reason(text: str) -> str:
    """Shorten an error to its cause."""
    return text.splitlines()[0].rpartition("exported as ")[2].partition(": ")[2].partition(";")[0] or text


def _programs(text: str) -> str:
    """Drop the versions of programs, and the libraries of llama.cpp."""
    names = [re.sub(r" [\d.]\S*", "", each) for each in text.split(", ")]
    return ", ".join(
        each.replace("xllamacpp", "llama.cpp") for each in names if each.split()[0] not in ("llama", "ggml")
    )


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    first, *others = (f"| {' | '.join(each)} |" for each in (headings, *rows))
    return "\n".join([first, "|" + "---|" * (first.count("|") - 1), *others])


def byte_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer of 512 tokens at most."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([HEAD], vocab_size=512, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        PAGE.write_text(page(byte_tokenizer(Path(place))))
