"""Rows of the table of record (record.py): what each fine-tunes, and how its model is served."""

import argparse
import ctypes
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from joint_table import opened
from llm_pruner import in_peer, spell_for_peer
from reach import space_overrides
from safetensors.torch import load_file, save_file

from qpruner.config.load import load_config
from qpruner.config.schema import RunConfig
from qpruner.data.encoding import load_encoded
from qpruner.data.sources import load_examples
from qpruner.export.gguf.checking import check_bytes
from qpruner.export.gguf.writing import write_adapter, write_gguf
from qpruner.export.recode import dense as unpacked
from qpruner.export.recode import recode
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.layout import group_linears, layout_of
from qpruner.models.loading import checkpoint_config, load_dense, load_tokenizer, resolve_source
from qpruner.pipeline.run import run
from qpruner.plans.plan import UNPRUNED
from qpruner.pruning.surgery import cut
from qpruner.quantization.bank import BankSource, read_grams
from qpruner.runs.records import SearchRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import remove

METADATA = 2_000_000
"""Bytes of our GGUF files beside the plan's: tokenizer, names, norms in float32."""
FILE_TYPES = {"q4_0": 2, "q4_k_m": 15, "q5_k_m": 17}  # llama.h, `llama_ftype`
PAPER = Path("tune_configs/paper")
AUTOROUND = {
    "bits": 4,
    "group_size": 64,
    "iters": 50,
    "lr": 5e-3,
    "nsamples": 64,
    "seqlen": 128,
    "batch_size": 4,
}
"""Its own recipe "auto-round-light" (50 iterations), with as many samples of as many tokens as our
calibration."""


@dataclass(frozen=True)
class Start:
    """A plan to fine-tune, with its cut and bank, and the seconds that pruning and search took."""

    bank: BankSource
    plan: dict[str, str]
    cut: str = UNPRUNED
    seconds: float = 0.0


@dataclass(frozen=True)
class Files:
    """The folder that is served, the model that transformers loads to score it, its GGUF files."""

    folder: Path
    loaded: Path
    gguf: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Bench:
    """The configuration, the options, and the prepared base model with its rows."""

    config: RunConfig
    asked: argparse.Namespace
    model: Path
    data: Path

    def bank(self, name: str, checkpoint: Path, **lora: Any) -> BankSource:
        settings = self.config.lora.model_copy(update=lora)
        place = self.asked.out / "banks" / name
        return BankSource(
            place, checkpoint, "block", self.config.model.dtype, settings, self.config.seed, name
        )

    def run_config(self, source: Path, folder: str, *overrides: str) -> RunConfig:
        """Load a configuration with the rows, the fine-tune and the scores of this benchmark."""
        same = {
            name: getattr(self.config, name)
            for name in ("model", "data", "training", "finetune", "evaluate")
        }
        given = [f"{name}={each.model_dump_json()}" for name, each in same.items()]
        return load_config(
            source, [*given, f"output={self.asked.out / folder}", *overrides, *self.asked.overrides]
        )


# ---- what is fine-tuned


def dense_plan(bench: Bench, checkpoint: Path) -> dict[str, str]:
    config = checkpoint_config(checkpoint)
    return (
        layout_of(config, bench.config.quantize, 2, bench.config.lora.rank, False).dense().as_dict()
    )


def base(bench: Bench) -> Start:
    return Start(bench.bank("base", bench.model), dense_plan(bench, bench.model))


def nf4_base(bench: Bench) -> Start:
    """QLoRA: bitsandbytes' layers in all blocks, adapters from zero."""
    plan = dense_plan(bench, bench.model) | dict.fromkeys(
        group_linears(checkpoint_config(bench.model), "block"), "nf4"
    )
    return Start(bench.bank("nf4", bench.model, init="plain"), plan)


def paper(bench: Bench, variant: str) -> Start:
    return searched(paper_config(bench, variant), variant, pruned=True)


def paper_config(bench: Bench, variant: str) -> RunConfig:
    text = {
        "source": bench.config.data.train[0].source,
        "format": "text",
        "columns": {"text": "output"},
    }
    calibration = f"calibration.data={json.dumps([text | {'split': 'train[:218]'}])}"
    return bench.run_config(PAPER / f"smollm2_135m_{variant}.yaml", f"paper-{variant}", calibration)


def ours(bench: Bench, megabytes: float, formats: str, plan: str = "") -> Start:
    """Search, or without cuts take the knapsack of the sensitivity `plan`."""
    size = round(megabytes * 1e6) - METADATA
    given = space_overrides(formats, megabytes)
    folder = f"ours-{formats}-{'small' if megabytes < 70 else 'large'}"
    if plan:
        methods = f"sensitivity.methods=[mutual_information,{plan}]"
        given += ["prune.rates=[0]", f"search.plan={plan}", methods]
        folder = f"{plan}-{formats}"
    config = bench.run_config(bench.asked.config, folder, f"quantize.budget.bytes={size}", *given)
    return searched(config, f"{megabytes:g}")


def searched(config: RunConfig, name: str, pruned: bool = False) -> Start:
    """Run a flow up to its plan, without trials of other rows in the same folder; a plan that is
    found is kept."""
    place = Path(config.output)
    kept, searching = (place.with_name(f"{place.name}-{end}") for end in (f"{name}.json", "now"))
    if not kept.exists():
        if not searching.exists() or searching.read_text() != name:
            for each in ("trials", "records/search.json"):
                remove(place / each)
            searching.write_text(name)
        results = run(config, lambda event: None, until="search")
        found = results.search
        assert isinstance(found, SearchRecord)
        seconds = (
            sum(record.seconds for _, record in results if record)
            - found.seconds
            + found.total_seconds
        )
        plan, cut = found.winner.plan, found.winner.cut
        if pruned and cut == UNPRUNED:  # a control won, which the paper's flow does not have
            others = [each for each in found.finalists if each.cut != UNPRUNED and each.fits]
            best = min(others, key=lambda finalist: finalist.mean.loss)
            plan, cut = best.plan, best.cut
        kept.write_text(json.dumps({"plan": plan, "cut": cut, "seconds": seconds}))
    kept_plan = json.loads(kept.read_text())
    return Start(opened(config).bank_of(kept_plan["cut"]), **kept_plan)


def llm_pruner(bench: Bench) -> Start:
    """LLM-Pruner's own program cuts the model; its rows are rows of the base, so the units that it
    kept say all."""
    folder = bench.asked.out / "llm-pruner"
    started = time.monotonic()
    if not (bench.asked.peer and bench.asked.peer_python):
        raise SystemExit(
            "row `llm-pruner` needs `--peer` and `--peer-python`: see benchmarks/llm_pruner.py"
        )
    if not (folder / "cut" / "config.json").exists():
        base_folder = folder / "base"
        base_folder.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(str(bench.model))
        save_checkpoint(load_dense(str(bench.model), "float32"), tokenizer, base_folder)
        spell_for_peer(base_folder)
        config = paper_config(bench, "uniform")
        run(config, lambda event: None, until="prepare")
        samples = RunDir(config.output).stage("prepare") / "data" / "importance"
        (folder / "tokens.json").write_text(
            json.dumps([row["input_ids"] for row in load_encoded(samples)])
        )
        kept = in_peer(bench.asked, base_folder, folder, "taylor first")
        model = load_dense(str(bench.model), bench.config.model.dtype)
        shared = model.config.num_attention_heads // model.config.num_key_value_heads
        for units in kept.values():
            whole = [
                head * shared + query for head in units["attention"] for query in range(shared)
            ]
            assert units["queries"] == whole, (
                "LLM-Pruner kept query heads of a key/value head that it cut"
            )
        cut(
            model,
            {
                index: {name: tuple(units[name]) for name in ("attention", "mlp")}
                for index, units in kept.items()
            },
        )
        save_checkpoint(model, tokenizer, folder / "cut")
        (folder / "seconds.json").write_text(json.dumps(time.monotonic() - started))
    plan = dense_plan(bench, folder / "cut")
    return Start(
        bench.bank("llm-pruner", folder / "cut"),
        plan,
        seconds=json.loads((folder / "seconds.json").read_text()),
    )


# ---- how it is served


def as_it_is(bench: Bench, start: Start, final: Path, folder: Path) -> Files:
    """Packed weights and the adapter, as transformers loads them."""
    shutil.copytree(final, folder)
    return Files(folder, folder)


def beside(bench: Bench, start: Start, final: Path, folder: Path) -> Files:
    """GGUF files of our own formats, the adapter in a file of its own."""
    folder.mkdir()
    model, adapter = folder / "model.gguf", folder / "adapter.gguf"
    write_gguf(final, model, "record")
    write_adapter(final, adapter)
    check_bytes(final, model, adapter)  # so the scores of `final` are those of these files
    return Files(folder, final, (model, adapter))


def source_file(bench: Bench, start: Start, final: Path, folder: Path) -> Files:
    """The quantized file that the base was unpacked from, the adapter in a file of its own."""
    folder.mkdir()
    model, adapter = folder / "model.gguf", folder / "adapter.gguf"
    shutil.copy(resolve_source(bench.config.model.source, "model.source"), model)
    write_adapter(final, adapter)
    # the weights that transformers unpacks, rounded to bf16
    return Files(folder, final, (model, adapter))


def one_file(bench: Bench, start: Start, final: Path, folder: Path) -> Files:
    """Write a GGUF file of our own formats.

    The adapter is merged into the weights, which GPTQ rounds once more.
    """
    bank = start.bank
    config = checkpoint_config(final)
    packed = final.with_name("packed")
    recode(
        final, packed, lambda name, columns: name, True,
        gram_of=lambda path: read_grams(bank.folder, bank.inputs, config, [path]).get(path),
    )  # fmt: skip
    folder.mkdir()
    write_gguf(packed, folder / "model.gguf", "record")
    check_bytes(packed, folder / "model.gguf", None)
    return Files(folder, packed, (folder / "model.gguf",))


def merged(final: Path, **formats: str) -> Path:
    """The adapter merged into the weights, in bf16 or packed again."""
    folder = final.with_name(f"{final.name}-merged")
    shutil.rmtree(folder, ignore_errors=True)
    recode(final, folder, unpacked, True, fixed=formats)
    return folder


def nf4_after(bench: Bench, start: Start, final: Path, folder: Path) -> Files:
    """The adapter merged, then NF4 in all blocks."""
    blocks = group_linears(checkpoint_config(final), "block").values()
    merged(final, **{path: "nf4" for paths in blocks for path in paths}).rename(folder)
    return Files(folder, folder)


def quantized(bench: Bench, start: Start, final: Path, folder: Path, kind: str) -> Files:
    """llama.cpp's own quantizer on the merged model."""
    dense = merged(final)
    write_gguf(dense, dense / "dense.gguf", "record")
    folder.mkdir()
    llama_quantize(bench.asked.libllama, dense / "dense.gguf", folder / "model.gguf", kind)
    shutil.rmtree(dense)
    return Files(folder, folder / "model.gguf", (folder / "model.gguf",))


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params`, of which the first two fields are the threads and the file
    type."""

    _fields_ = [("fields", ctypes.c_uint32 * 256)]


def llama_quantize(place: Path | None, source: Path, target: Path, kind: str) -> None:
    found = sorted(place.rglob("linux-x64/libllama.*so")) if place else []
    if not found:
        raise SystemExit(
            f"`--libllama`: no libllama.*.so below {place}: `npm install --prefix` it, "
            "as --help says"
        )
    library = ctypes.CDLL(str(found[0]))
    ctypes.CDLL(str(next(found[0].parent.glob("libggml.*so")))).ggml_backend_load_all_from_path(
        bytes(found[0].parent)
    )
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.POINTER(_Parameters),
    ]
    library.llama_backend_init()
    parameters = library.llama_model_quantize_default_params()
    parameters.fields[0] = 1
    parameters.fields[1] = FILE_TYPES[kind]
    if status := library.llama_model_quantize(
        bytes(source), bytes(target), ctypes.byref(parameters)
    ):
        raise SystemExit(
            f"llama.cpp cannot quantize {source} to {kind}: status {status}, its messages are above"
        )


def autoround(bench: Bench, start: Start, final: Path, folder: Path) -> Files:
    """AutoRound's own package on the merged model, calibrated on training rows."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    dense = merged(final)
    texts = final.with_name(f"{final.name}.jsonl")
    rows = load_examples(bench.config.data.train[:1], "data.train")
    lines = (
        json.dumps({"text": "\n".join((row.prompt, row.context, row.response))}) for row in rows
    )
    texts.write_text("\n".join(lines))
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=bench.config.model.dtype)
    rounding = AutoRound(
        model, load_tokenizer(str(dense)), dataset=str(texts), device_map="cpu", **AUTOROUND
    )
    rounding.quantize_and_save(str(dense / "saved"), format="auto_round")
    [saved] = (dense / "saved").iterdir()
    # Where the CPU has no bf16 it saves embeddings and norms in float32, exactly the bf16 values
    # that they had.
    state = load_file(saved / "model.safetensors")
    state = {
        name: each.bfloat16() if each.dtype == torch.float32 else each
        for name, each in state.items()
    }
    (saved / "model.safetensors").unlink()
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    saved.rename(folder)
    shutil.rmtree(dense)
    return Files(folder, folder)


@dataclass(frozen=True)
class Row:
    """A row of the table; rows with the same `tuned` share a fine-tune."""

    tuned: str
    start: Callable[[Bench], Start]
    serve: Callable[[Bench, Start, Path, Path], Files]
    title: str


def _rows() -> dict[str, Row]:
    """Name every row of the table."""
    rows = {
        "dense": Row("dense", base, as_it_is, "not pruned, not quantized, LoRA"),
        "q4_1": Row("dense", base, source_file, "the base's own Q4_1 file, LoRA beside it"),
        "autoround": Row("dense", base, autoround, "not pruned, LoRA, then AutoRound's 4 bits"),
        "nf4": Row("nf4", nf4_base, as_it_is, "not pruned, bitsandbytes' NF4, then LoRA"),
        "llm-pruner": Row("llm-pruner", llm_pruner, nf4_after, "LLM-Pruner's cut, LoRA, then NF4"),
    }
    for kind in FILE_TYPES:
        title = f"not pruned, LoRA, then llama.cpp's {kind.upper()}"
        rows[kind] = Row("dense", base, partial(quantized, kind=kind), title)
    for variant in ("uniform", "mutual_information", "bayesian"):
        name = f"paper-{variant}"
        start = partial(paper, variant=variant)
        rows[name] = Row(name, start, as_it_is, f"the paper's flow, {variant}")
    for size in (60, *SIZES):
        start = partial(ours, megabytes=size, formats="llama.cpp")
        rows[f"ours-{size:g}"] = Row(f"ours-{size:g}", start, beside, "ours")
    for size in SIZES:
        start = partial(ours, megabytes=size, formats="llama.cpp", plan="second_order")
        tuned = f"unsearched-{size:g}"
        rows[tuned] = Row(tuned, start, beside, "ours without a search, not pruned")
        rows[f"one-file-{size:g}"] = Row(tuned, start, one_file, "the same, adapter merged by GPTQ")
        by_kl = partial(ours, megabytes=size, formats="llama.cpp", plan="kl")
        name = f"kl-{size:g}"
        rows[name] = Row(name, by_kl, beside, "ours without a search by kl, not pruned")
    start = partial(ours, megabytes=60, formats="all")
    rows["ours-60-all"] = Row("ours-60-all", start, as_it_is, "ours, eight kinds")
    return rows


SIZES = (91.7, 105.4, 112.1, 125)
ROWS = _rows()
