"""A model of transformers whose blocks have widths of their own.

The config lists them in `per_layer_config`. qpruner copies this file beside the weights, and
transformers and vLLM import it with `trust_remote_code=True`. It needs only torch and transformers,
reads and writes no files, and only replaces the blocks of transformers' own classes:
`RaggedLlamaForCausalLM` is `LlamaForCausalLM` with each block built from its own config.
"""

from typing import Any

import transformers


def __getattr__(name: str) -> Any:
    """Make the class `Ragged<Name>` from transformers' class `<Name>`."""
    if not name.startswith("Ragged"):
        raise AttributeError(name)
    return type(
        name,
        (_Ragged, getattr(transformers, name.removeprefix("Ragged"))),
        {"__module__": __name__},
    )


class _Ragged:
    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        decoder: Any = getattr(self, self.base_model_prefix, self)  # type: ignore[attr-defined]
        for index, alike in enumerate(decoder.layers):
            block = type(alike)(config.per_layer_config[index], index)
            # Not the layer's copy, as the attention's kind may be chosen later.
            block.self_attn.config = config
            decoder.layers[index] = block
        self.post_init()  # type: ignore[attr-defined]
