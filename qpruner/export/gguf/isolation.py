"""Run a generator function in a process of its own.

A crash of llama.cpp there is an error like others.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from qpruner.errors import QprunerError, StageError

T = TypeVar("T")
REMEDY = (
    "repeat the command; if it happens again, report it with the file and the version of "
    "`xllamacpp`"
)


def isolated(function: Callable[..., Iterator[T]], *arguments: Any) -> Iterator[T]:
    """Yield what a generator function of a module yields in a new interpreter.

    An error that it raises there is raised here; a crash becomes a `StageError`.
    """
    reading, writing = os.pipe()
    with open(reading, "rb") as answers, tempfile.TemporaryFile() as output:
        child = _start(writing, output)
        try:
            assert child.stdin
            with child.stdin:
                pickle.dump((function, arguments), child.stdin)
            while True:
                kind, value = pickle.load(answers)  # noqa: S301
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
        except (EOFError, pickle.UnpicklingError, BrokenPipeError) as error:
            raise _died(child.wait(), output) from error
        finally:
            child.kill()
            child.wait()


def _start(writing: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a new interpreter that runs `_serve` and answers through the pipe `writing`."""
    # Not multiprocessing: its children import the user's script again.
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    # -P: no `random.py` of the current folder.
    command = [sys.executable, "-P", "-m", __name__, str(writing)]
    child = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[writing],
        env={**os.environ, "PYTHONPATH": paths, "GGML_NO_BACKTRACE": "1"},
    )
    os.close(writing)
    return child


def _died(status: int, output: IO[bytes]) -> StageError:
    end = f"ended with exit code {status}"
    if status < 0:
        end = f"was ended by {signal.Signals(-status).name}"
    output.seek(0)
    printed = output.read().decode(errors="replace").strip()
    if printed:
        last_line = printed.splitlines()[-1].strip()
        end += f": {last_line}"
    return StageError("export", f"the process that runs llama.cpp {end}", REMEDY)


def _serve(descriptor: int) -> None:
    """Call the function that the parent names, and send what it yields."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    with open(descriptor, "wb") as answers:

        def send(kind: str, value: Any = None) -> None:
            pickle.dump((kind, value), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()

        try:
            function, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301
            for value in function(*arguments):
                send("value", value)
        except QprunerError as error:
            send("error", error)
        except Exception:
            send("error", RuntimeError(traceback.format_exc()))
        else:
            send("end")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
