"""Run programs in new processes, and load model folders where qpruner cannot be imported."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from conftest import Raw, run_program

PROGRAM = """
import importlib.abc, json, sys

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
    sys.exit("qpruner can be imported after all")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

prompt, plain, ragged = json.loads(sys.argv[1])
ids = torch.tensor(prompt)

def answer(folder):
    try:
        options = {"dtype": torch.float32, "trust_remote_code": True, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    assert not any(info[kind] \
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found = {"logits": model(ids, use_cache=False).logits.tolist(), \
"layers": model.config.num_hidden_layers}
    for key, use_cache in (("made", True), ("made without cache", False)):
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, \
"use_cache": use_cache}
        made = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
        found |= {key: made.sequences.tolist(), f"logits {key}": torch.stack(made.logits).tolist()}
    return found

for folder in plain:
    print(json.dumps(answer(folder)))
assert not any(name.split(".")[0] == "qpruner" for name in sys.modules)
if ragged:
    sys.meta_path.pop(0)
    import qpruner.hf
for folder in ragged:
    print(json.dumps(answer(folder)))
"""


def run_python(program: str, *arguments: str, folder: Path | None = None, **variables: str) -> str:
    """Run a program in a new process, which must succeed, and return its output."""
    command = (sys.executable, "-c", program, *arguments)
    environment = os.environ | variables
    return run_program(*command, folder=folder, environment=environment, minutes=10).stdout


def plain_transformers_answers(
    prompt: Sequence[Sequence[int]],
    folders: Iterable[Path],
    working_folder: Path,
    ragged: Iterable[Path] = (),
) -> list[Raw]:
    """Return logits in float32, greedily generated tokens and the number of layers, or the error,
    for each folder.

    Folders in `ragged` come last and are loaded after `import qpruner.hf`.
    """
    arguments = json.dumps([prompt, *(list(map(str, each)) for each in (folders, ragged))])
    written = run_python(
        PROGRAM,
        arguments,
        folder=working_folder,
        HF_HUB_OFFLINE="1",
        HF_MODULES_CACHE=str(working_folder),
    )
    return [json.loads(line) for line in written.splitlines()]
