"""On a CPU without bfloat16 instructions, products are computed in float32, and not much slower
than float32."""

from plain_transformers import run_python

SCRIPT = """
import time, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from qpruner.models import cpu
cpu.install()

def seconds(dtype, columns, rows):
    layer = torch.nn.Linear(columns, rows).to(dtype)
    inputs = torch.randn(512, columns).to(dtype).requires_grad_()
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        layer(inputs).sum().backward()
        taken.append(time.perf_counter() - started)
    return min(taken)

for shape in ((576, 768), (8, 1536)):  # a layer, and half of an adapter
    narrow, wide = seconds(torch.bfloat16, *shape), seconds(torch.float32, *shape)
    # Without `install` it is 5 to 40 times as long on a CPU without these instructions.
    assert narrow < 4 * wide, (narrow, wide)

config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
ids, mask = torch.randint(0, 64, (2, 24)), torch.ones(2, 24, dtype=torch.long)
mask[0, :5] = 0
before = model(ids, attention_mask=mask).logits
cpu.widen()
after = model(ids, attention_mask=mask).logits
assert after.dtype is torch.bfloat16
seen = mask.bool()
torch.testing.assert_close(after[seen].float(), before[seen].float(), rtol=0.05, atol=0.02)
after.float().sum().backward()
assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
assert model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).shape == (2, 28)

for dtype in (torch.bfloat16, torch.float32, torch.float64):
    a, b, c = (torch.randn(shape).to(dtype) for shape in ((40, 64), (64, 48), (48,)))
    wide = dtype if dtype is torch.float64 else torch.float32
    expected = (a.to(wide) @ b.to(wide)).to(dtype)
    assert torch.equal(a @ b, expected) and (a @ b).dtype is dtype, dtype
    summed = torch.addmm(c.to(wide), a.to(wide), b.to(wide), beta=0.5, alpha=2).to(dtype)
    assert torch.equal(torch.addmm(c, a, b, beta=0.5, alpha=2), summed)
    batched = torch.bmm(a.expand(3, -1, -1), b.expand(3, -1, -1))
    torch.testing.assert_close(batched, expected.expand(3, -1, -1))
    assert torch.baddbmm(batched, a.expand(3, -1, -1), b.expand(3, -1, -1)).dtype is dtype
    assert (a[:0] @ b).shape == (0, 48)
    assert torch.equal((b.T @ a.T), (b.T.to(wide) @ a.T.to(wide)).to(dtype))
try:
    torch.mm(torch.randn(32, 32).to(torch.bfloat16), torch.randn(32, 32))
    raise AssertionError("factors of two dtypes were multiplied")
except RuntimeError as error:
    assert "dtype" in str(error), error
"""


def test_bfloat16_is_computed_in_float32_and_not_much_slower() -> None:
    """In a new process, because replaced kernels cannot be restored."""
    run_python(SCRIPT, PYTHONWARNINGS="error::UserWarning")
