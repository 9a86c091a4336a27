"""Running out of memory: recognised whoever says it, and said again with what can be done about it."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Iterator

from grafting.errors import OutOfMemoryError

_SIGNS = (  # in the words of errors that have no type of their own
    "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "Cannot allocate memory",
)  # fmt: skip


def said_of(error: BaseException) -> str | None:
    """What an error says of memory that ran out, in a line; None for every other error."""
    first = re.sub(r"^\[enforce fail.*?\] (err == 0\. )?", "", next(iter(str(error).splitlines()), ""))[:120]
    if isinstance(error, MemoryError):
        return first or "MemoryError"
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return None
    import torch

    known = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)
    return first if known else None


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """While inside, running out of memory is an OutOfMemoryError that says what it happened to and the remedy.

    What the failed work held is given back; the error that it raised is the cause, with its lines.
    """
    try:
        yield
    except Exception as error:
        if (said := said_of(error)) is None:
            raise
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemoryError(f"{what} ran out of memory ({said}); {remedy}") from error
