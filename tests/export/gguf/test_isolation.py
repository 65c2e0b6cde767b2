"""llama.cpp in a process of its own: results come one by one, and a crash is an error with a remedy."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_gguf import write_small

from qpruner.errors import StageError, UserError
from qpruner.export.gguf.isolation import isolated
from qpruner.export.gguf.llama_cpp import predictions


def count(end: int) -> Iterator[int]:
    yield from range(end)


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
    yield 1 // 0


def process() -> Iterator[int]:
    while True:
        yield os.getpid()


def test_results_come_one_by_one() -> None:
    assert list(isolated(count, 3)) == [0, 1, 2]


def test_an_error_of_ours_keeps_its_type() -> None:
    with pytest.raises(UserError, match="no such file: name another"):
        list(isolated(refuse))


def test_a_crash_is_an_error_with_a_remedy() -> None:
    answers = isolated(crash)
    assert next(answers) == 1
    with pytest.raises(StageError, match=r"was ended by SIGABRT: ggml\.c:9: GGML_ASSERT\(rows > 0\) failed\n  remedy"):
        next(answers)
    with pytest.raises(StageError, match="ended with exit code 3"):
        list(isolated(leave))


def test_a_file_that_is_cut_while_it_is_read_crashes_llama_cpp_alone(tmp_path: Path) -> None:
    model = write_small(tmp_path / "small.gguf")
    answers = isolated(predictions, model, None, [range(2, 202)] * 50, 64)
    assert next(answers).startswith("xllamacpp") and next(answers)
    os.truncate(model, 100)
    with pytest.raises(StageError, match=r"was ended by SIGBUS[\s\S]*remedy"):
        list(answers)


def test_another_error_tells_where_it_happened() -> None:
    with pytest.raises(RuntimeError, match="in fail"):
        list(isolated(fail))


def test_a_process_that_is_not_needed_ends() -> None:
    answers = isolated(process)
    pid = next(answers)
    answers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
