"""The exception tree: one sentence a class, and the exit code that the command line gives for it."""

from __future__ import annotations


class RaytuneError(Exception):
    """Anything that this library raises on purpose."""

    exit_code = 1


class RunError(RaytuneError):
    """A run started and could not be finished; its folder keeps what was done and why it stopped."""


class InfeasibleError(RunError):
    """A run cannot be carried out with its settings: another attempt would end in the same way."""

    step = 0
    """The step that could not be made, where that is known."""


class OutputError(RaytuneError):
    """Standard output does not take what is printed."""


class StoppedError(RunError):
    """A run was asked to stop and saved what it had; the same command goes on from there."""

    exit_code = 143


class UserError(RaytuneError):
    """Something that the user can mend: the message says what was wanted, what came, and how to mend it."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting is missing, misspelt, of the wrong type or out of range."""


class DataError(UserError):
    """Records cannot be read, or cannot be used as they are; names the file and the line."""


class ModelError(UserError):
    """A model reference does not lead to a usable model."""


class ArtifactError(UserError):
    """A folder is not the finished artifact that was asked for, or cannot become one without losing something."""


class StorageError(ArtifactError):
    """Storage refused to be read or written; `number` is the system's for why, 0 where there is none."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


class ClusterError(UserError):
    """The cluster cannot be reached, or cannot place what the run needs."""


class ServingError(UserError):
    """An endpoint cannot be started as asked for."""


class MissingDependencyError(UserError):
    """Something that this feature needs is not installed; the message gives the command that installs it."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; of one that says nothing, its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """The last line of what an error says, where Ray's have what matters; of one that says nothing, its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
