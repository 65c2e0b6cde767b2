"""Run programs in processes of their own, such as transformers on a model folder without qpruner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WITHOUT_QPRUNER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "qpruner":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
try:
    import qpruner
except ModuleNotFoundError:
    pass
else:
    sys.exit("qpruner is there after all")
"""
"""First lines of a program that cannot import qpruner until it calls `sys.meta_path.pop(0)`."""

PROGRAM = f"""{WITHOUT_QPRUNER}
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

prompt, *folders = json.loads(sys.argv[1])
for folder in folders:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        print(json.dumps({{"refused": f"{{type(error).__name__}}: {{error}}"}}))
        continue
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(prompt)
    with torch.no_grad():
        logits = model(ids).logits.float()
    made = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    print(json.dumps({{"logits": logits.tolist(), "made": made.tolist(), "layers": model.config.num_hidden_layers}}))
assert not any(name.split(".")[0] == "qpruner" for name in sys.modules)
"""


def run_python(program: str, *arguments: str, folder: Path | None = None, **variables: str) -> str:
    """Run a program in its own process, which must succeed, and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain_transformers_answers(
    prompt: Sequence[Sequence[int]], folders: Iterable[Path], working_folder: Path
) -> list[dict[str, Any]]:
    """Return for each folder the logits in float32, greedy next tokens and number of layers, or the error."""
    written = run_python(PROGRAM, json.dumps([prompt, *map(str, folders)]), folder=working_folder)
    return [json.loads(line) for line in written.splitlines()]
