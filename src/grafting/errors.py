"""Errors that teach: what was given, what was expected, where, and what to do about it.

Everything that a user can cause is a `GraftError`; the command line prints it as one line and exits with
its `exit_code`. Any other exception is a defect of this package.
"""

from __future__ import annotations


class GraftError(ValueError):
    """Bad input or usage. Base class of every error that this package raises on purpose."""

    exit_code = 2


class PlanError(GraftError):
    """A plan, entry or selector that is malformed, conflicts with itself, or does not fit the model."""


class OperatorError(GraftError):
    """An operator that is not registered, or whose configuration does not fit."""


class CheckpointError(GraftError):
    """A weight file, graft folder or checkpoint that is missing, damaged, unsafe, or of another model."""


class DataError(GraftError):
    """Data of the wrong shape, range or kind."""


class RunError(GraftError):
    """A recipe or run folder that cannot be used as asked."""


class InUseError(RunError):
    """A folder that another living process writes to: it can be waited for, unlike a disk that refuses."""


class OutOfMemoryError(RunError):
    """A device or machine that has not the memory that a stage needs as it is set; trying again would not help."""


class DivergedError(GraftError):
    """A loss or gradient that is no longer finite: the run stopped, its last good checkpoint is kept."""

    exit_code = 3


class PeerError(GraftError):
    """Another process of the same run failed, was killed, or can't be reached any more."""

    exit_code = 137


class Interrupted(Exception):
    """A stage stopped on request after writing a checkpoint; `code` is the process's exit status."""

    def __init__(self, code: int, step: int) -> None:
        super().__init__(f"stopped at step {step} on request; --resume goes on from there")
        self.code = code
