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
    folder, first = f"{run}/{PurePath(row.files[0]).parent}", []
    if "://" in run:  # servers read files of this machine alone
        merge = " --merge" if row.form.endswith("merged") else ""
        folder, first = (
            "FOLDER",
            [f"qpruner export {shlex.quote(run)} --to gguf{merge} --out FOLDER"],
        )
    names = [PurePath(file).name for file in sorted(row.files, key=len) if file.endswith(".gguf")]
    model, *adapter = (shlex.quote(f"{folder}/{name}") for name in names)
    lora = f" --lora {adapter[0]}" if adapter else ""
    called = re.sub(r"\W+", "-", PurePath(names[0]).stem, flags=re.ASCII).strip("-") or "model"
    create = f"ollama create {called} -f {shlex.quote(f'{folder}/Modelfile')}"
    return [*first, f"llama-cli -m {model}{lora}", create]
