"""What a person sees while it works: a bar with ETA on a terminal, plain lines otherwise; always on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

_QUIET_SECONDS = 10.0  # plain lines come at most this often


class Console:
    """Progress and remarks. Standard output stays free for results."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._last: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self.stream, flush=True)

    def progress(self, stage: str, step: int, total: int, text: str) -> None:
        """Where a stage stands."""
        if self.quiet:
            return
        if self.stream.isatty():
            self._live(stage, step, total, text)
            return
        now = time.monotonic()
        if step >= total or now - self._last.get(stage, -1e9) >= _QUIET_SECONDS:
            self._last[stage] = now
            print(f"{stage} {step}/{total}: {text}", file=self.stream, flush=True)

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}

    def _live(self, stage: str, step: int, total: int, text: str) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            note = TextColumn("{task.fields[note]}")
            columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), note)
            self._bar = Progress(*columns, console=RichConsole(file=self.stream))
            self._bar.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, note="")
        self._bar.update(self._tasks[stage], completed=step, total=total, note=text)
