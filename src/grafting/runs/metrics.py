"""metrics.jsonl: one JSON object a line; what is written twice after a resume, torn or too much is taken out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grafting.errors import RunError
from grafting.formats import weights

MAX_LINES = 10_000
"""Of one kind (training, validation) and stage. Longer runs are thinned: one line for each 1/10,000 of the steps."""


class MetricsLog:
    """The file and the rule of what goes into it, which depends on the steps alone: a resumed run writes the same.

    num_steps: the length of a stage in steps, or None where it is not known (then nothing is thinned).
    """

    def __init__(self, path: Path, num_steps: Callable[[str], int | None]) -> None:
        self.path, self.num_steps = path, num_steps
        self._last: dict[tuple[str, str], int] | None = None  # (stage, kind) -> step of the last line

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, unless the run is so long that this one is thinned out. Raises RunError."""
        if self._last is None:
            self._last = _last_steps(self.read())
        key, step = _key(record), record.get("step")
        if isinstance(step, int):
            if key in self._last and not self._is_wanted(record, step, self._last[key]):
                return
            self._last[key] = step
        line = (json.dumps(plain_json(record)) + "\n").encode()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            handle = os.open(self.path, flags, 0o644)
            try:
                while line:
                    line = line[os.write(handle, line) :]
            finally:
                os.close(handle)
        except OSError as error:
            raise RunError(f"can't write {str(self.path)!r}: {error.strerror or error}") from None

    def read(self) -> list[dict[str, Any]]:
        """All lines; a torn last line is left out."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        found = []
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                found.append(record)
        return found

    def drop(self, stage: str, after: int) -> None:
        """Take out the lines of a stage that lie after a step, which it will write again, and what is torn."""
        kept = [r for r in self.read() if r.get("stage") != stage or _step(r) <= after]
        content = "".join(json.dumps(record) + "\n" for record in kept).encode()
        try:
            current = self.path.read_bytes()
        except OSError:
            current = b""
        if content != current:
            weights.write_bytes(self.path, content)
        self._last = _last_steps(kept)

    def _is_wanted(self, record: Mapping[str, Any], step: int, last: int) -> bool:
        total = self.num_steps(str(record.get("stage")))
        if total is None or total <= MAX_LINES or record.get("event") not in (None, "validation"):
            return True
        return step >= total or step * MAX_LINES // total != last * MAX_LINES // total


def plain_json(value: Any) -> Any:
    """JSON types; non-finite floats become null."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _key(record: Mapping[str, Any]) -> tuple[str, str]:
    return str(record.get("stage")), str(record.get("event"))


def _step(record: Mapping[str, Any]) -> int:
    step = record.get("step", 0)
    return step if isinstance(step, int) else 0


def _last_steps(records: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    return {_key(record): _step(record) for record in records}
