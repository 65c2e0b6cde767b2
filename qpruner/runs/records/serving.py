"""The record of stage serve: the files for other servers, their size, loss and speed."""

from typing import Literal

from qpruner.runs.records.base import Record, Recorded
from qpruner.runs.records.search import BASE, SEARCHED

ServedForm = Literal["gguf", "gguf_merged", "vllm", "vllm_merged"]
"""Files for llama.cpp or vLLM: as trained, or with the adapter merged into the weights."""


class ServedRow(Recorded):
    """A model as it is served.

    It is the final model in one form, the best simple alternative, or the base model as it is.
    """

    name: str
    """`base`, `searched` or a control, as in the final table."""
    form: ServedForm
    format: str
    """The type of the base model's weights; `plan` if each group has its own format."""
    files: tuple[str, ...] = ()
    """Paths in the run folder of the final model; other files are removed once they are measured.
    """
    has_adapter: bool = False
    """Whether an adapter is in a file of its own."""
    file_bytes: int
    """Bytes of all files of the model and its adapter, with tokenizer and metadata."""
    mean_bits: float
    """Mean bits of the blocks' weights, without scales."""
    loss: float | None = None
    """Nats per token on the confirmation rows that judge the winner, as this server computes it."""
    prefill_tokens_per_second: tuple[float, ...] = ()
    """One value per turn; in every turn each row is measured once."""
    decode_tokens_per_second: tuple[float, ...] = ()
    check: str = ""
    """What the files were compared with before they were called done, and how alike they were."""
    recoded: dict[str, str] = {}
    """Layer -> its format in these files, for layers that the server cannot take as the plan has
    them."""

    @property
    def title(self) -> str:
        """The server and its files for people, such as `GGUF Q4_0`."""
        server = "GGUF" if self.form.startswith("gguf") else "vLLM"
        if self.name == BASE:
            return f"{server} {self.format.upper()}"
        if self.form.endswith("_merged"):
            return f"{server}, adapter merged"
        return f"{server}, adapter beside it" if self.has_adapter else server


class ServeSetting(Recorded):
    """How the rows of a `ServeRecord` were measured."""

    threads: int
    build: str
    """Version of llama.cpp; empty if no row runs in it."""
    prompt_tokens: int
    new_tokens: int
    num_rows: int
    """Confirmation rows behind each loss."""


class ServeRecord(Record):
    """The final model as files for other servers, measured beside the base model.

    The models are measured in turns in one process.
    """

    rows: tuple[ServedRow, ...]
    setting: ServeSetting

    @property
    def best(self) -> ServedRow | None:
        """The final model's row with the lowest loss among those that llama.cpp has measured.

        It is None if llama.cpp has measured none.
        """
        measured = [row for row in self.rows if row.name == SEARCHED and row.loss is not None]
        return min(measured, key=lambda row: row.loss or 0.0, default=None)
