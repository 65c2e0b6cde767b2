"""Define the errors that users can meet.

A `UserError` (exit code 2) is a mistake in the input; others exit with 1.
"""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qpruner.wording import counted

DEFECT = (
    "this is most likely a defect of qpruner, not a mistake in your input; the command can be "
    "repeated and continues after the last recorded step"
)
"""Remedy for an unexpected error."""
NODE_REMEDY = (
    "install the same versions there and mount the same storage (`launch/up.sh` or "
    "`launch/setup.sh`), or remove that node from the cluster (`ray stop` on it); then repeat the "
    "command to continue"
)


class QprunerError(Exception):
    """Base of every error that is reported without a traceback."""

    exit_code = 1


class UserError(QprunerError):
    """The user's input is invalid; raised before expensive work wherever possible."""

    exit_code = 2


class ConfigError(UserError):
    """One or more problems in a configuration, listed in one message.

    `source` is the configuration file.
    """

    def __init__(self, problems: Iterable[str], source: str | None = None) -> None:
        self.problems, self.source = tuple(problems), source
        heading = f"{source}: " if source else ""
        lines = [f"\n  - {problem}" for problem in self.problems]
        super().__init__(
            f"{heading}{counted(len(lines), 'problem')} in the configuration:{''.join(lines)}"
        )


def together(*checks: Callable[[], Any]) -> list[Any]:
    """Run independent checks and return their results.

    The mistakes of all checks are raised at once, as one `ConfigError`.
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
        problems = [
            error.problems if isinstance(error, ConfigError) else [str(error)] for error in errors
        ]
        raise ConfigError(itertools.chain(*problems))
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if that is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class PlanRefused(UserError):
    """The plan that `search.plan` names cannot be used."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"`search.plan`: {problem}")


class RemediableError(QprunerError):
    """Base of errors that name a cause and a remedy."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)  # pickle rebuilds an error of a worker from its arguments
        self.cause, self.remedy = cause, remedy

    def __str__(self) -> str:
        return f"{self.cause}\n  remedy: {self.remedy}"


class StageError(RemediableError):
    """A stage failed while it ran; earlier records stay valid."""

    def __init__(self, stage: str, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.stage, self.args = stage, (stage, cause, remedy)

    def __str__(self) -> str:
        return f"stage `{self.stage}` failed: {super().__str__()}"


class StorageError(RemediableError):
    """The run's storage cannot be used, even after repeated attempts.

    It may be full or unreachable.
    """


class OutOfMemory(RemediableError):
    """The machine or its GPU ran out of memory in a command that runs no stage."""


class NodeDiffers(RemediableError):
    """A node joined the cluster during the run and does not match the other nodes."""

    def __init__(self, cause: str, remedy: str = NODE_REMEDY) -> None:
        super().__init__(cause, remedy)


def note_defect(error: Exception, evidence: str = "the output above") -> str:
    """Add to an unexpected error the note that it is a likely defect to report.

    The note is added once only, and returned.
    """
    for note in getattr(error, "__notes__", ()):
        if DEFECT in note:
            return str(note)
    note = f"  remedy: {DEFECT}; please report it with {evidence}"
    error.add_note(note)
    return note


class TrainingDiverged(QprunerError):
    """The training or validation loss became NaN, infinite or worse than by random guessing."""


class SolverFailed(QprunerError):
    """The knapsack solver ended without a plan and without a proof that no plan exists."""


class RayNotStarted(QprunerError):
    """Ray did not start on this machine; earlier records stay valid."""


class WorkerDied(QprunerError):
    """Ray's workers died repeatedly while they ran the same task."""


class TakenOver(QprunerError):
    """Another process has taken over this trial or fine-tune.

    It did so because this machine was unreachable for a while.
    """


class CorruptFile(QprunerError):
    """A file that a record lists is damaged: its content does not have the expected format."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        self.path = path
        super().__init__(message)
