"""The serve stage: write the final model for other servers, and measure size, loss and speed as served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.errors import UserError
from qpruner.pipeline.stage import Stage
from qpruner.runs.records import FinetuneRecord, PrepareRecord, ServeRecord


class Serve(Stage[ServeRecord]):
    """Write the forms in `serve.to`, and measure them beside the base model, in turns in one process."""

    name = "serve"
    record = ServeRecord

    @classmethod
    def is_wanted(cls, config: RunConfig) -> bool:
        return bool(config.serve.to)

    def check(self) -> None:
        if self.is_wanted(self.config):
            raise UserError("`serve.to`: no form can be written yet: take it out")

    def inputs(self) -> tuple[Any, ...]:
        prepared, tuned = self.context.record(PrepareRecord), self.context.record(FinetuneRecord)
        return (prepared.digest, tuned.digest, [each.adapter_sha256 for each in tuned.candidates], self.config.serve)

    def detail(self) -> str:
        return ", ".join(self.config.serve.to)

    def run(self, scratch: Path) -> dict[str, Any]:
        raise NotImplementedError

    def summary(self, record: ServeRecord) -> str:
        return ", ".join(row.form for row in record.rows)
