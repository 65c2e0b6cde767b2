"""Writes `served_table.md`, which server takes which format and family: `python docs/served.py`
(minutes).

Each cell is an export of a tiny random model with an adapter, loaded again and compared. vLLM
itself loads what it can if another environment has it (`QPRUNER_VLLM_PYTHON`, see
`launch/serve_tests.sh`), else transformers does.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
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

<!-- Made by `python docs/served.py`: each cell is an export of a tiny model \
that the server has loaded again. -->

After this page you know what becomes of a format in llama.cpp and vLLM. Each cell was tried: \
a tiny random model with
an adapter was exported, loaded there and compared with transformers. `yes`: \
packed weights stay as they are. A format:
layers become that. `no`: refused ([why](serve.md#what-cannot-be-written)). \
(compressed-tensors): in transformers, as
vLLM on a CPU takes 4 bits only.
"""
FORMS: dict[Form, str] = {"gguf": "`--to gguf`", "vllm": "`--to vllm`"}
SERVERS = ("xllamacpp", "vLLM")
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "granite",
    "olmo2",
    "phi3",
)
TRIED: dict[Form, str] = {"gguf": "q4_0", "vllm": "w4_g32"}
"""The format in which every family is tried."""
GEMMA_2 = {
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
"""As in real ones: llama.cpp loads no Gemma 2 without a sliding window."""
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""Sizes that the k-quants take."""


def page(tokenizer: Path) -> str:
    """Try everything, and return the page."""
    # Formats that differ in their codes, not in their layout, are one row.
    names = [
        name
        for name, each in formats().items()
        if name != DENSE and not name.endswith(("_hqq", "_double"))
    ]
    with ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn")
    ) as pool:  # two cores are what CI has
        asked = {
            name: [("llama", False, name, form, tokenizer) for form in FORMS] for name in names
        }
        asked |= {
            name: [
                (name, ragged, TRIED[form], form, tokenizer)
                for form in FORMS
                for ragged in (False, True)
            ]
            for name in FAMILIES
        }
        running = {
            name: [pool.submit(tried, *each) for each in cells] for name, cells in asked.items()
        }
        cells = {name: tuple(each.result() for each in row) for name, row in running.items()}
    headings = (
        f"{title}{blocks}" for title in FORMS.values() for blocks in (", alike", ", ragged")
    )
    return "\n".join(
        [
            HEAD,
            "## Formats, in a Llama\n\n"
            f"{_table(('formats', *FORMS.values()), _rows(cells, names))}\n",
            f"## Families, in {' and '.join(TRIED.values())}\n\n"
            "Blocks are alike, or ragged: of different widths.\n\n"
            f"{_table(('families', *headings), _rows(cells, FAMILIES))}\n",
        ]
    )


def tried(family: str, is_ragged: bool, name: str, form: Form, tokenizer: Path) -> str:
    """Export a model of a family in one format, and say what came of it."""
    sizes = (WIDE if name.endswith("_k") else {}) | (GEMMA_2 if family == "gemma2" else {})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        run_of(
            pruned_model(family, tokenizer, Path(folder) / "pruned", is_ragged, **sizes),
            root,
            (name,),
        )
        try:
            done = export(RunDir(root), form, root / "out")
        except UserError:
            return "no"
        except StageError as error:
            return f"fails: {error.cause}"
    became = ", ".join(f"`{each}`" for each in sorted(set(done.recoded.values())))
    program = done.by.split(" ")[0]
    return (became or "yes") + ("" if program in SERVERS else f" ({program})")


def _rows(cells: dict[str, tuple[str, ...]], names: Iterable[str]) -> list[tuple[str, ...]]:
    """Put names with the same cells into one row."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        alike.setdefault(cells[name], []).append(name)
    return [(", ".join(together), *row) for row, together in alike.items()]


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    first, *others = (f"| {' | '.join(each)} |" for each in (headings, *rows))
    return "\n".join([first, "|" + "---|" * (first.count("|") - 1), *others])


def byte_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer of 512 tokens at most."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [HEAD], vocab_size=512, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        PAGE.write_text(page(byte_tokenizer(Path(place))))
