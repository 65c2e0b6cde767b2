"""The commands that talk to a run's files for llama.cpp and Ollama."""

import re
import shlex
from pathlib import PurePath

from qpruner.runs.records import ServeRecord


def commands(record: ServeRecord | None, run: str) -> list[str]:
    """Return the commands that talk to the files with the least loss.

    The list is empty if the run has no such files. `run` is the run folder.
    """
    if record is None or record.best is None:
        return []
    row = record.best
    folder = f"{run}/{PurePath(row.files[0]).parent}"
    lines = []
    if "://" in run:  # servers read files of this machine alone
        folder = "FOLDER"
        merge = " --merge" if row.form.endswith("merged") else ""
        lines.append(f"qpruner export {shlex.quote(run)} --to gguf{merge} --out FOLDER")

    # The shortest name is the model's; the adapter's is longer by `-adapter`.
    names = [PurePath(file).name for file in sorted(row.files, key=len)]
    model, *adapters = [name for name in names if name.endswith(".gguf")]
    talk = f"llama-cli -m {shlex.quote(f'{folder}/{model}')}"
    for adapter in adapters:
        talk += f" --lora {shlex.quote(f'{folder}/{adapter}')}"
    lines.append(talk)

    name = re.sub(r"\W+", "-", PurePath(model).stem, flags=re.ASCII).strip("-") or "model"
    lines.append(f"ollama create {name} -f {shlex.quote(f'{folder}/Modelfile')}")
    return lines
