"""The record of stage serve: the files for other servers, their size, loss and speed."""

from typing import Literal

from qpruner.runs.records.base import Record, Recorded

ServedForm = Literal["gguf", "gguf_merged", "vllm", "vllm_merged"]
"""Files for llama.cpp or vLLM, with the adapter in a file of its own or merged into the weights."""


class ServedRow(Recorded):
    """A model as it is served: the final one in one form, the best simple alternative, or the base as it is."""

    name: str
    """`base`, `searched` or a control, as in the final table."""
    form: ServedForm
    format: str
    """The type of the base model's weights; `plan` if each group has its own format."""
    files: tuple[str, ...] = ()
    """Paths in the run folder of the final model; other files are removed once they are measured."""
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
    """Layer -> its format in these files, for layers that the server cannot take as the plan has them."""


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
    """The final model as files for other servers, and the base model beside it, measured in turns in one process."""

    rows: tuple[ServedRow, ...]
    setting: ServeSetting
