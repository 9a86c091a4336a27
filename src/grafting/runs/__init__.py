"""Run folders: what a run leaves, what it needs to go on after a stop, and who may write to it."""

from __future__ import annotations

from grafting.runs.folder import RunFolder
from grafting.runs.lock import FolderLock
from grafting.runs.machine import environment
from grafting.runs.status import run_status

__all__ = ["FolderLock", "RunFolder", "environment", "run_status"]
