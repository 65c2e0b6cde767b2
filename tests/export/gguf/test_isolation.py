"""llama.cpp in a process of its own: results come one by one, and a crash is an error with a
remedy."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qpruner.errors import StageError, UserError
from qpruner.export.gguf.isolation import isolated
from qpruner.export.gguf.llama_cpp import predictions


def refuse() -> Iterator[int]:
    yield 1
    raise UserError("no such file: name another")


def crash() -> Iterator[int]:
    yield 1
    os.write(2, b"ggml.c:9: GGML_ASSERT(rows > 0) failed\n\n")
    os.kill(os.getpid(), signal.SIGABRT)


def leave() -> Iterator[int]:
    yield 1
    os._exit(3)


def fail() -> Iterator[int]:
    yield 1
    raise ValueError("odd")


def process() -> Iterator[int]:
    while True:
        yield os.getpid()


@pytest.mark.parametrize(
    ("function", "kind", "told"),
    [
        (refuse, UserError, "^no such file: name another$"),
        (
            crash,
            StageError,
            r"was ended by SIGABRT: ggml\.c:9: GGML_ASSERT\(rows > 0\) failed\n  remedy",
        ),
        (leave, StageError, "ended with exit code 3"),
        (fail, RuntimeError, "in fail"),
    ],
)
def test_an_error_comes_after_what_was_found(
    function: Callable[[], Iterator[int]], kind: type[Exception], told: str
) -> None:
    """Our errors keep their type, a crash has a remedy, other errors tell where they happened."""
    answers = isolated(function)
    assert next(answers) == 1
    with pytest.raises(kind, match=told):
        next(answers)


def test_a_file_that_is_cut_while_it_is_read_crashes_llama_cpp_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    # the child imports this file too, and torch takes seconds
    from qpruner.export.gguf.writing import (
        write_gguf,
    )

    model = tmp_path / "tiny.gguf"
    write_gguf(tiny_model, model, "tiny")
    answers = isolated(predictions, model, None, [range(2, 202)] * 50, 64, 1)
    assert next(answers).startswith("xllamacpp")
    assert next(answers)
    os.truncate(model, 100)
    with pytest.raises(StageError, match=r"was ended by SIGBUS[\s\S]*remedy"):
        list(answers)


def test_a_process_that_is_not_needed_ends() -> None:
    answers = isolated(process)
    pid = next(answers)
    answers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_files_of_the_current_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        list(isolated(refuse))
