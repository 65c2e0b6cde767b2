"""Move the base model's weights off the grid of the format from which it was unpacked.

    .venv/bin/python benchmarks/moved_base.py SOURCE FOLDER [--seed 0]

The only base at hand was unpacked from Q4_1, so its weights lie on that grid, and a format with the
same grid has an advantage that no other base gives it. This script multiplies each channel by a
random factor of 0.7 to 1.4 on one side of a layer and divides by it on the other: between a norm
and q, k, v or gate, up; between v and o (the same for all query heads of a key/value head); between
up and down. The function stays the same; in float32 logits differ by rounding alone, which the
script measures and prints. Embeddings are tied to the head and stay on the grid.

The weights are written in float32. SOURCE is anything that `model.source` takes; the model must be
a Llama.
"""

import math
from pathlib import Path

import torch
from harness import command_line
from transformers import LlamaForCausalLM

from qpruner.models.loading import load_dense, load_tokenizer, resolve_source

LEAST, MOST = 0.7, 1.4
DIFFERENCE = 1e-4  # of the largest logit, at most


def factors(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw factors between LEAST and MOST whose logarithms are uniform."""
    low, high = math.log(LEAST), math.log(MOST)
    return torch.exp(low + (high - low) * torch.rand(count, generator=generator))


@torch.no_grad()
def move(model: LlamaForCausalLM, seed: int) -> None:
    """Move random factors between the layers of a model, in place."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    queries = config.num_attention_heads // config.num_key_value_heads
    for block in model.model.layers:
        attention = block.self_attn
        mlp = block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factor = factors(config.hidden_size, generator)
            norm.weight.mul_(factor)
            for layer in readers:
                layer.weight.div_(factor)

        factor = factors(attention.v_proj.out_features, generator)
        attention.v_proj.weight.mul_(factor[:, None])
        by_head = factor.view(config.num_key_value_heads, 1, -1).expand(-1, queries, -1)
        attention.o_proj.weight.div_(by_head.reshape(-1))

        factor = factors(mlp.up_proj.out_features, generator)
        mlp.up_proj.weight.mul_(factor[:, None])
        mlp.down_proj.weight.div_(factor)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("source")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = resolve_source(arguments.source, "SOURCE")
    model = load_dense(source, "float32").eval()
    if not isinstance(model, LlamaForCausalLM):
        raise SystemExit(f"SOURCE: expected a Llama, got {type(model).__name__}")
    tokens = torch.randint(model.config.vocab_size, (4, 64))
    with torch.no_grad():
        before = model(tokens).logits
        move(model, arguments.seed)
        difference = float((model(tokens).logits - before).abs().max() / before.abs().max())
    if not difference < DIFFERENCE:
        raise SystemExit(f"the function changed: logits differ by {difference:.1e} of the largest")
    model.save_pretrained(arguments.folder)
    load_tokenizer(source).save_pretrained(arguments.folder)
    print(f"{arguments.folder}: logits differ by {difference:.1e} of the largest")


if __name__ == "__main__":
    main()
