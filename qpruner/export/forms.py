"""Export the final model in forms that other tools load.

An export is written to a hidden folder, loaded by the program that will serve it and compared with
the model; only then is it renamed. Layers that a server cannot take in the plan's format get the
nearest one (`recode`), and `Exported.remarks` lists them.
"""

import importlib.util
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal

from filelock import FileLock, Timeout

from qpruner.data.encoding import load_encoded
from qpruner.errors import UserError
from qpruner.export.compare import Compared, compare, loss_of
from qpruner.export.gguf import architectures
from qpruner.export.gguf.llama_cpp import library_path
from qpruner.export.recode import (
    ADAPTER_FILES,
    GramOf,
    NewFormat,
    changes,
    copy_adapter,
    dense,
    formats_of,
    has_adapter,
    read_settings,
    recode,
    tensor_bytes,
)
from qpruner.export.vllm import checking as in_vllm
from qpruner.export.vllm import writing as for_vllm
from qpruner.hf import PEFT_BASE, load
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress, load_tokenizer
from qpruner.models.memory import raising_out_of_memory
from qpruner.quantization.bank import read_grams
from qpruner.runs.records import MARK, ExportRecord, FinetuneRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import exists, fetch, retry_storage, storage_at, write_json
from qpruner.wording import counted

Form = Literal["merged", "peft", "gguf", "gguf_merged", "vllm", "vllm_merged"]
AGAINST_SHORTAGE = (
    "end other programs, or repeat the command on a machine with more memory; if a GPU ran out of "
    "memory, set "
    "`CUDA_VISIBLE_DEVICES=` to use the CPU"
)
NUM_ROWS = 8  # number of rows of `data.confirmation` on which predictions are compared
LONGEST = 256  # tokens of a row that are compared
RECODED = "recoded"
WITH_ADAPTER: Mapping[Form, Form] = {
    "peft": "merged",
    "gguf_merged": "gguf",
    "vllm_merged": "vllm",
}
"""Forms that need an adapter, and the form that a model without one has instead."""


@dataclass(frozen=True)
class Exported(Compared):
    """A finished export, compared with the checkpoint in its formats.

    `loss_before` is the loss of the final model.
    """

    form: Form
    folder: Path
    is_plain: bool  # whether it loads without qpruner
    # layers that the server cannot take in the plan's format, each with its format here
    recoded: Mapping[str, str]
    remarks: tuple[str, ...]  # what differs from the final model, for people
    file_bytes: int  # of all files that a server reads
    tensor_bytes: int  # of weights and adapter in these formats; the rest is tokenizer and metadata
    plan_bytes: int  # of weights and adapter of the final model


def refusal(
    form: Form, config: Any, ragged: bool = False, uniform: str = architectures.UNIFORM
) -> str | None:
    """Say why a model cannot be exported in a form, and what would work.

    Return None if it can be exported; see `architectures.refusal` for the arguments.
    """
    if form.startswith("vllm"):
        return for_vllm.refusal(config) or in_vllm.missing()
    if not form.startswith("gguf"):
        return None
    reason = architectures.refusal(config, ragged, uniform)
    if reason:
        return reason
    if importlib.util.find_spec("gguf") is None:
        return 'the package gguf is missing: run `pip install "qpruner[gguf]"`'
    library_path()
    return None


@raising_out_of_memory(AGAINST_SHORTAGE)
def export(
    run: RunDir, form: Form, target: Path, on_progress: OnWork = ignore_progress
) -> Exported:
    """Export the final model of a run to a new folder.

    The form `merged` has dense weights with any adapter merged in; `peft` has the adapter, and the
    quantized model in a subfolder. `gguf` and `vllm` have packed weights for llama.cpp and vLLM,
    with the adapter in files of its own; `gguf_merged` and `vllm_merged` have it merged into the
    packed weights.

    Raises:
        UserError: The run has no final model, the folder exists, or the model has no such form.
        StageError: The export and the model differ.
    """
    final = run.root / "final"
    if not exists(final / "config.json"):
        raise UserError(f"{run.place} has no final model: repeat `qpruner run` to finish the run")
    if target.exists():
        raise UserError(f"{target} exists: delete this folder or name another with `--out`")
    record = ExportRecord(final=run.final_digests())
    final = fetch(final)
    reason = refusal(form, checkpoint_config(final))
    if not has_adapter(final) and form in WITH_ADAPTER:
        reason = f"it has no adapter (`training.method: scales`): export {WITH_ADAPTER[form]}"
    if reason:
        raise UserError(f"this model cannot be exported as {form}: {reason}")

    writers = {"merged": _merged, "peft": _peft, "gguf": _gguf, "vllm": _vllm}
    write = writers[form.removesuffix("_merged")]
    with _hidden_folder(target) as scratch:
        work = _Work(
            form=form,
            final=final,
            folder=scratch,
            target=target,
            name=PurePath(run.place).name,
            rows=run.stage("prepare") / "data" / "confirmation",
            on_progress=on_progress,
            gram_of=_grams_of(run, final),
        )
        exported = write(work)
        write_json(scratch / MARK, record)
        storage_at(target).publish(scratch)
    return exported


def _grams_of(run: RunDir, final: Path) -> GramOf:
    """Return a function that reads the matrices by which GPTQ rounded the final model.

    It returns None for every layer if the model was rounded without GPTQ.
    """
    tuned = run.read_record("finetune", FinetuneRecord)
    if tuned is None or not tuned.winner.bank:
        return lambda path: None
    winner = tuned.winner
    config = checkpoint_config(final)
    return lambda path: read_grams(run.bank(winner.cut), winner.bank, config, [path]).get(path)


@contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """Yield the path of a new folder beside `target`, for this process alone.

    What is left in it is deleted at the end.
    """
    # A name of ours: beside `config` there may be a `.config` that is not.
    place = target.with_name(f".{target.name}.qpruner-export")
    lock = FileLock(place / "lock")
    folder = place / target.name
    try:
        retry_storage(lambda: place.mkdir(parents=True, exist_ok=True), place)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{target} is being written by another command: name another folder with `--out`"
        ) from error
    except OSError as error:
        raise UserError(
            f"{target} cannot be made ({error.strerror}): name another folder with `--out`"
        ) from error

    try:
        shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
        yield folder
    finally:
        shutil.rmtree(place, ignore_errors=True)
        lock.release()


@dataclass(frozen=True)
class _Work:
    """What every form is made from."""

    form: Form
    final: Path
    folder: Path  # hidden, and renamed to `target` at the end
    target: Path
    name: str
    rows: Path
    on_progress: OnWork
    gram_of: GramOf

    @cached_property
    def samples(self) -> list[list[int]]:
        """Token ids of the rows on which predictions are compared."""
        return [list(row["input_ids"][:LONGEST]) for row in load_encoded(self.rows)[:NUM_ROWS]]

    def recoded(
        self, new_format: NewFormat, fixed: Mapping[str, str]
    ) -> tuple[Path, dict[str, str]]:
        """Return a checkpoint in other formats, and the layers whose format changed.

        The adapter is merged in if the form wants that.
        """
        merge = self.form.endswith("merged")
        if not merge and not changes(self.final, new_format, fixed):
            return self.final, {}
        folder = self.folder / RECODED
        changed = recode(
            self.final,
            folder,
            new_format,
            merge,
            on_progress=self.on_progress,
            fixed=fixed,
            gram_of=self.gram_of,
        )
        return folder, changed

    def exported(
        self,
        compared: Compared,
        recoded: Mapping[str, str] | None = None,
        remarks: Iterable[str | None] = (),
    ) -> Exported:
        """Describe the finished folder; the recoded checkpoint that it was made from goes."""
        loss_before = compared.loss_before
        if (self.folder / RECODED).exists():
            loss_before = loss_of(load(self.final).eval(), self.samples)
            shutil.rmtree(self.folder / RECODED, ignore_errors=True)
        recoded = recoded or {}
        format_changes = _format_changes(formats_of(checkpoint_config(self.final)), recoded)
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        return Exported(
            **vars(replace(compared, loss_before=loss_before)),
            form=self.form,
            folder=self.target,
            is_plain=self._is_plain(),
            recoded=recoded,
            remarks=tuple(filter(None, [*format_changes, *remarks])),
            file_bytes=sum(file.stat().st_size for file in files),
            tensor_bytes=tensor_bytes(self.folder),
            plan_bytes=tensor_bytes(self.final),
        )

    def _is_plain(self) -> bool:
        """Return True if the finished folder loads without qpruner."""
        if self.form == "peft":
            return False
        if not (self.folder / "config.json").is_file():
            return True
        config = checkpoint_config(self.folder)
        return not config.is_heterogeneous or "auto_map" in vars(config)


def _format_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Tell how many layers changed from which format to which."""
    counts = Counter((old[path], name) for path, name in new.items())
    return [
        f"{counted(count, 'layer')} from {before} to {after}"
        for (before, after), count in counts.items()
    ]


def _merged(work: _Work) -> Exported:
    """Write a dense model, with the file that builds its blocks if they differ."""
    recode(work.final, work.folder, dense, merge=True, on_progress=work.on_progress)
    config = checkpoint_config(work.folder)
    if not for_vllm.needs_modeling(config):
        return work.exported(compare(work.final, work.folder, work.samples, work.on_progress))

    described = read_settings(work.folder / "config.json")
    retry_storage(lambda: for_vllm.write_config(described, config, work.folder), work.folder)
    compared = in_vllm.check(
        work.final, work.folder, work.samples, work.on_progress, server="transformers"
    )
    return work.exported(compared)


def _peft(work: _Work) -> Exported:
    """Write the adapter and, in a subfolder, its quantized base.

    The adapter names its base by the path that it will have in `target`.
    """
    base = work.folder / PEFT_BASE
    left_out = shutil.ignore_patterns(*ADAPTER_FILES, "README.md")

    def write() -> None:
        shutil.copytree(work.final, base, ignore=left_out, dirs_exist_ok=True)

    retry_storage(write, work.target)
    copy_adapter(work.final, work.folder, work.target / PEFT_BASE)
    tokenizer = load_tokenizer(str(work.final))
    retry_storage(lambda: tokenizer.save_pretrained(work.folder), work.target)
    return work.exported(compare(work.final, work.folder, work.samples, work.on_progress))


def _gguf(work: _Work) -> Exported:
    """Write files for llama.cpp: the model, a Modelfile, and any adapter that is not merged."""
    from qpruner.export.gguf import checking, vocabulary, writing
    from qpruner.export.gguf.modelfile import modelfile

    checkpoint, recoded = work.recoded(architectures.llama_cpp_format, {})
    work.folder.mkdir(parents=True, exist_ok=True)
    model = work.folder / f"{work.name}.gguf"
    writing.write_gguf(checkpoint, model, work.name, work.on_progress)
    adapter = None
    if not work.form.endswith("merged") and has_adapter(checkpoint):
        adapter = work.folder / f"{work.name}-adapter.gguf"
        writing.write_adapter(checkpoint, adapter, work.on_progress)

    config = checkpoint_config(checkpoint)
    tokenizer = load_tokenizer(str(checkpoint))
    text = modelfile(
        model.name,
        adapter.name if adapter else None,
        tokenizer,
        vocabulary.stop_ids(checkpoint),
        architectures.context_length(config),
    )
    file = work.folder / "Modelfile"
    retry_storage(lambda: file.write_text(text, encoding="utf-8"), work.folder)

    compared = checking.check(checkpoint, model, adapter, work.samples, work.on_progress)
    remarks = [architectures.remark(config), vocabulary.remark(tokenizer)]
    return work.exported(compared, recoded, remarks)


def _vllm(work: _Work) -> Exported:
    """Write a checkpoint of compressed-tensors."""
    dense_paths = for_vllm.dense_paths(checkpoint_config(work.final))
    checkpoint, recoded = work.recoded(for_vllm.vllm_format, dense_paths)
    for_vllm.write_vllm(checkpoint, work.folder, work.target, work.on_progress)
    compared = in_vllm.check(checkpoint, work.folder, work.samples, work.on_progress)
    return work.exported(compared, recoded)
