"""Write the Modelfile with which Ollama takes a GGUF file."""

import json
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

CONTEXT = 4096  # most tokens of context asked for: the memory for more is the user's decision
TEMPLATE = (
    "# Ollama takes that of its own templates that is nearest to the model's; a line TEMPLATE sets "
    "another."
)


def modelfile(
    file: str,
    adapter: str | None,
    tokenizer: PreTrainedTokenizerBase,
    stops: Iterable[int],
    context_length: int,
) -> str:
    """Return the text of a Modelfile for files in the same folder.

    Args:
        file: Name of the model's file.
        adapter: Name of the adapter's file; None without an adapter.
        tokenizer: The tokenizer of the model.
        stops: Ids at which generation ends, beside the tokenizer's own.
        context_length: The longest context of the model in tokens.
    """
    lines = ["# ollama create NAME -f Modelfile && ollama run NAME", f"FROM ./{file}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")

    ends = set(stops)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    for text in sorted(tokenizer.convert_ids_to_tokens(sorted(ends))):
        lines.append(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}")

    lines.append(f"PARAMETER num_ctx {min(context_length, CONTEXT)}")
    if tokenizer.chat_template:
        lines.append(TEMPLATE)
    return "\n".join(lines) + "\n"
