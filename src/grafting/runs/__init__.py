"""Run folders: what a run leaves, what it needs to go on after a stop, and who may write to it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grafting.runs.folder import RunFolder
    from grafting.runs.lock import FolderLock
    from grafting.runs.machine import environment
    from grafting.runs.status import run_status

__all__ = ["FolderLock", "RunFolder", "environment", "run_status"]

# Where each name lives. Loaded at first use: `graft status` waits for no torch.
_HOMES = {"FolderLock": "lock", "RunFolder": "folder", "environment": "machine", "run_status": "status"}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A name of this package at first use."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
