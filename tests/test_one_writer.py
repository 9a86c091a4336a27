"""Of several processes the first alone writes, but for batches of samples: what each of two asks of the disk."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from several import together
from tiny_runs import run_as_one_of_several, tiny_recipe

CHANGES = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "os.utime", "shutil.rmtree", "shutil.copyfile", "shutil.move", "tempfile.mkstemp", "tempfile.mkdtemp",
}  # fmt: skip
PART = re.compile(
    r"os.mkdir \.(teacher|student)\.parts|(tempfile.mkstemp|open|os.chmod|os.rename) \.\d{6}\.npy\..*\.tmp"
)
READING = os.O_RDONLY | os.O_CLOEXEC


def watched_run(folder: Path, recipe: dict[str, Any]) -> list[str]:
    """The recipe as one of several processes; every change that this one asked for below `folder`."""
    asked: list[str] = []

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event not in CHANGES or not given or not str(given[0]).startswith(str(folder)):
            return
        if event == "open":
            mode, flags = given[1], given[2]
            if not (set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)):
                return
        asked.append(f"{event} {Path(str(given[0])).name}")

    sys.addaudithook(watch)
    run_as_one_of_several(recipe, folder)
    return asked


def test_the_first_process_alone_writes_but_batches_of_samples(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, finetune={"preview_every": 2, "preview_samples": 2}, sample={"batch_size": 4}
    )
    first, second = together(2, watched_run, tmp_path / "run", recipe)
    assert isinstance(first, list), first
    assert isinstance(second, list), second
    assert (
        second
    )  # its share of the samples: each batch a file, in the folder that the first makes and removes
    assert [line for line in second if not PART.fullmatch(line)] == []
    names = " ".join(first)
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "status.json", "000000002.pt", "graft.json", "report.html",
                 "student.npz", "finetune-000002.png"):  # fmt: skip
        assert name in names, name
