"""`graft` with a counter of what it holds, for `long_run.py`: python inside.py NOTES EVERY COMMAND...

Every EVERY steps of a stage, when its line of the log has been written and cyclic garbage is collected, a line goes to
NOTES: stage, step, `blocks` (small objects that Python holds), `objects` (those its collector knows) and `malloc_kb`
(what the C library has given out and not got back, tensors included; null where it can't say).
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIELDS = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class Info(ctypes.Structure):
    """mallinfo2 of glibc 2.33 and later: bytes in use are `uordblks` (heaps) and `hblkhd` (maps)."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def main() -> None:
    """Wrap the log of a run, then do as `graft` does."""
    notes, every = Path(sys.argv[1]), int(sys.argv[2])
    sys.argv = ["graft", *sys.argv[3:]]
    from grafting.cli import main as graft
    from grafting.runs import RunFolder

    log, malloc = RunFolder.log, malloc_kb()
    last: dict[str, Any] = {}

    def counting(self: RunFolder, record: Mapping[str, Any]) -> None:
        log(self, record)
        stage, step = record.get("stage"), record.get("step")
        if record.get("event") or not step or step % every or last == {"stage": stage, "step": step}:
            return
        last.update(stage=stage, step=step)
        gc.collect()
        line = {
            "stage": stage, "step": step, "blocks": sys.getallocatedblocks(), "objects": len(gc.get_objects()),
            "malloc_kb": malloc() if malloc else None,
        }  # fmt: skip
        with notes.open("a") as file:
            file.write(json.dumps(line) + "\n")

    RunFolder.log = counting  # type: ignore[method-assign]
    graft()


def malloc_kb() -> Any:
    """A function that says how many KB malloc has given out, or None."""
    try:
        call = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    call.restype = Info

    def kb() -> float:
        info = call()
        return round((info.uordblks + info.hblkhd) / 1000, 3)

    return kb


if __name__ == "__main__":
    main()
