"""The serve stage: write the final model for other servers, and measure it.

Its size, loss and speed are measured as they serve it.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.errors import UserError
from qpruner.export.commands import commands
from qpruner.models.loading import check_source, load_tokenizer
from qpruner.pipeline.comparison import final_jobs
from qpruner.pipeline.report import report_unfinished
from qpruner.pipeline.served_rows import ServeJob, serve
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import UNPRUNED
from qpruner.pruning.settings import uniform_remedy
from qpruner.runs.records import (
    MERGED,
    SEARCHED,
    FinetuneRecord,
    PrepareRecord,
    ServedForm,
    ServeRecord,
)
from qpruner.runs.storage import display_name
from qpruner.search.roles import rival_row
from qpruner.training.jobs import FineTuneJob

COLUMNS = 4096  # columns that every format takes
BASE_BYTES = 6
"""Bytes per weight of the base model's files, and of the largest checkpoint that one of them is
written from."""


class Serve(Stage[ServeRecord]):
    """Write the forms in `serve.to`, and measure them beside the base model.

    They are measured in turns in one process.
    """

    name = "serve"
    record = ServeRecord
    starts_ray = False
    memory_keys = "`evaluate.batch_size`, or use a machine with more memory"

    @classmethod
    def is_wanted(cls, config: RunConfig) -> bool:
        return bool(config.serve.to)

    def warnings(self) -> Iterator[str]:
        if not self.config.serve.uses_llama_cpp:
            return
        from qpruner.export.gguf.architectures import llama_cpp_format, remark

        quantize = self.config.quantize
        for name in dict.fromkeys((*quantize.levels, *quantize.embedding_levels)):
            if (nearest := llama_cpp_format(name, COLUMNS)) != name:
                yield (
                    f"`serve.to`: llama.cpp has no format {name}: its layers get {nearest}, "
                    "and are scored anew"
                )
        reservation = remark(self.context.inspection.shapes.model_config)
        if reservation:
            yield f"`serve.to`: {reservation}"

    def check(self) -> None:
        for form in self.config.serve.to:
            if reason := self._refusal(form):
                remedy = "name other forms, or none (on the command line `--set serve.to=[]`)"
                raise UserError(f"`serve.to`: {form} cannot be written: {reason}; or {remedy}")
        if self.config.serve.uses_llama_cpp:
            self._check_tokenizer()

    def _refusal(self, form: ServedForm) -> str | None:
        """Say why the base model or a cut cannot have this form, and what would work.

        None is returned if all can.
        """
        from qpruner.export.forms import refusal

        shapes = self.context.inspection.shapes
        reasons = [refusal(form, shapes.model_config)]
        for cut in shapes.cuts.values():
            settings = cut.settings
            is_free = (
                settings.selection == "global"
                and not settings.uniform
                and bool(settings.width_units)
            )
            remedy = uniform_remedy(shapes.model_config, settings)
            is_free = is_free and not settings.is_off
            reasons.append(refusal(form, cut.model_config, is_free, remedy))
        return next(filter(None, reasons), None)

    def _check_tokenizer(self) -> None:
        from qpruner.export.gguf.vocabulary import vocabulary

        source = check_source(self.config.model)
        if source.endswith(".gguf"):  # takes 15 s to convert, and comes from llama.cpp
            return
        tokenizer = load_tokenizer(source, self.config.model)
        config = self.context.inspection.shapes.model_config
        ends = config.eos_token_id
        try:
            vocabulary(
                tokenizer, config.vocab_size, [ends] if isinstance(ends, int) else ends or ()
            )
        except UserError as error:
            raise UserError(f"`serve.to`: {error}; or set `serve.to: []`") from error

    def inputs(self) -> tuple[Any, ...]:
        prepared, tuned = self.context.record(PrepareRecord), self.context.record(FinetuneRecord)
        others = [job.record.digest for job in self._others]
        about = ([tuned.winner.trained_sha256], others)
        return (prepared.digest, tuned.digest, about, self.config.serve, _versions())

    @cached_property
    def _others(self) -> list[FineTuneJob]:
        """The merged model and the winner's rival, with its training seed, if they were made."""
        if self.context.records.comparison is None:
            return []
        shown = (MERGED, rival_row(self.context.records))
        first: dict[str, FineTuneJob] = {}
        for job in final_jobs(self.context):
            first.setdefault(job.record.name, job)
        return [job for name, job in first.items() if name in shown]

    def detail(self) -> str:
        return f"{', '.join(self.config.serve.to)}{self.config.serve.how}"

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        self.notify(f"the winner is done: {report_unfinished(context.run_dir)}")
        winner = context.record(FinetuneRecord).winner
        threads = self.config.serve.threads
        if threads is None:
            threads = max(1, int(context.machines.trial_resources["cpu"]))
        job = ServeJob(
            config=context.worker_config,
            root=context.run_dir.root,
            base=context.places.model_folder(UNPRUNED),
            data=context.places.data,
            scratch=scratch,
            threads=threads,
            layout=context.shapes.layout_of(winner.cut),
            winner=winner,
            others=tuple(self._others),
        )
        return context.machines.executor.run(partial(serve, job), context.emit)

    def summary(self, record: ServeRecord) -> str:
        found = [row for row in record.rows if row.name == SEARCHED]
        sizes = [f"{row.title} {row.file_bytes / 1e6:.1f} MB" for row in found]
        return "; ".join([*sizes, *commands(record, display_name(self.context.run_dir.root))[:1]])

    def disk_bytes(self) -> int:
        shapes = self.context.inspection.shapes
        forms = 2 * len(self.config.serve.to) * shapes.budget_bytes
        # For vLLM embeddings and head are unpacked, in the recoded checkpoint too.
        tables = [group for group in shapes.base.groups if group.is_table]
        unpacked = 2 * sum(group.num_weights for group in tables)
        forms += 2 * unpacked * sum(form.startswith("vllm") for form in self.config.serve.to)
        if self.config.serve.uses_llama_cpp:
            forms += BASE_BYTES * shapes.base.num_parameters
        return forms


def _versions() -> dict[str, str]:
    """Return the versions of the packages that write and run the files.

    Those that are missing are left out.
    """
    found = {}
    for name in ("gguf", "xllamacpp", "vllm"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
