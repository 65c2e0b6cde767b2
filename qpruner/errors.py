"""The errors a person can meet, and the exit code each one means.

`UserError` is a mistake in the input (exit code 2): its message names the key, the value, the rule and the remedy.
`StageError` is a stage that could not go on (exit code 1): a full disk, a diverging loss, a truncated file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qpruner.wording import counted

DEFECT = (
    "this is most likely a defect of qpruner, not of your input: the command can be repeated and goes on from what is "
    "recorded"
)
"""Message for an unexpected error."""
NODE_REMEDY = (
    "install the same there, with the same storage (`launch/up.sh`, or `launch/setup.sh`), or take that node out of "
    "the cluster (`ray stop` on it), then repeat the command: it goes on"
)


class QprunerError(Exception):
    """Base of every error that is reported without a traceback."""

    exit_code = 1


class UserError(QprunerError):
    """Something in the user's input cannot work; nothing expensive has been done yet."""

    exit_code = 2


class ConfigError(UserError):
    """One or more problems in a configuration, shown together; `source` is the file that has them."""

    def __init__(self, problems: Iterable[str], source: str | None = None) -> None:
        self.problems, self.source = tuple(problems), source
        heading = f"{source}: " if source else ""
        lines = [f"\n  - {problem}" for problem in self.problems]
        super().__init__(f"{heading}{counted(len(lines), 'problem')} in the configuration:{''.join(lines)}")


def together(*checks: Callable[[], Any]) -> list[Any]:
    """Run independent checks, and report every mistake at once.

    Raises:
        UserError: What one of them raised, as it is; a `ConfigError` of what several raised.
    """
    found, errors = [], []
    for check in checks:
        try:
            found.append(check())
        except UserError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [error.problems if isinstance(error, ConfigError) else [str(error)] for error in errors]
        raise ConfigError(itertools.chain(*problems))
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class PlanRefused(UserError):
    """A plan in a file cannot be used."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"`search.plan`: {problem}")


class RemediableError(QprunerError):
    """Base of errors that name a cause and what to do about it."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)  # with all arguments it can travel between Ray's processes
        self.cause, self.remedy = cause, remedy

    def __str__(self) -> str:
        return f"{self.cause}\n  remedy: {self.remedy}"


class StageError(RemediableError):
    """A stage failed while it ran; what was recorded before it stays valid."""

    def __init__(self, stage: str, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.stage, self.args = stage, (stage, cause, remedy)

    def __str__(self) -> str:
        return f"stage `{self.stage}` failed: {super().__str__()}"


class StorageError(RemediableError):
    """The run's storage stayed full or unreachable for longer than a write waits."""


class OutOfMemory(RemediableError):
    """Memory of the machine or its GPU ran out in a command that is no stage."""


class NodeDiffers(RemediableError):
    """A node that joined the cluster later cannot be used for the run."""

    def __init__(self, cause: str, remedy: str = NODE_REMEDY) -> None:
        super().__init__(cause, remedy)


def note_defect(error: Exception, evidence: str = "what stands above") -> str:
    """Add a note to an unexpected error that says what to do, once, and what a report of it needs; return the note."""
    for note in getattr(error, "__notes__", ()):
        if DEFECT in note:
            return str(note)
    note = f"  remedy: {DEFECT}; please report it with {evidence}"
    error.add_note(note)
    return note


class TrainingDiverged(QprunerError):
    """The training or validation loss became NaN, infinite or worse than blind guessing."""


class SolverFailed(QprunerError):
    """The knapsack solver ended without an answer: neither a plan nor the proof that there is none."""


class RayNotStarted(QprunerError):
    """Ray did not come up on this machine; what was recorded before it was needed stays valid."""


class WorkerDied(QprunerError):
    """Ray's workers died under one piece of work, again and again."""


class TakenOver(QprunerError):
    """Another process works on this trial or fine-tune by now: this one's machine was cut off and came back."""


class CorruptFile(QprunerError):
    """A file that a record lists cannot be read as what it should be."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        self.path = path
        super().__init__(message)
