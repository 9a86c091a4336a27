"""What verbs share: the console, loading a model, and printing results (stdout) as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from grafting.training.compute import Compute


def new_console(quiet: bool = False) -> Any:
    from grafting.console import Console

    return Console(quiet=quiet)


def spread(processes: int, device: str, precision: str = "fp32") -> Compute:
    """Start this command in several processes and end with their status; or be one of several that meets the others."""
    from grafting.launch import launch, wanted

    if wanted(processes):
        raise SystemExit(launch(sys.argv[1:], processes))
    from grafting.loading import as_device
    from grafting.training.compute import make_compute

    return make_compute(as_device(device), precision)


def refuse_several(what: str) -> None:
    """Raise GraftError in one of several processes that a launcher started: `what` is work for one."""
    from grafting.errors import GraftError
    from grafting.processes import place

    if (world := place().world) > 1:
        raise GraftError(
            f"{what} is work for one process, and this is one of {world} that were started together"
        )


def parse_dtype(name: str | None) -> Any:
    """A type of weights by its name, or None. Raises GraftError."""
    if name is None:  # without importing torch
        return None
    from grafting.loading import as_dtype

    return as_dtype(name)


def check_common(device: str, dtype: str | None = None) -> None:
    """Refuse what is no device here and no type, where neither changes anything. Raises GraftError."""
    from grafting.loading import as_device

    as_device(device)
    parse_dtype(dtype)


def recipe_changes(set: list[str] | None, *, dtype: str | None = None, seed: int | None = None) -> list[str]:
    """Changes to a recipe: those of `--set`, then what has an option of its own."""
    given = {"dtype": dtype, "seed": seed}
    return [*(set or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]


def parse_batch_size(text: str) -> Any:
    if text == "auto":
        return text
    from grafting.errors import GraftError

    if not text.isdecimal() or int(text) < 1:
        raise GraftError(f"--batch-size {text!r}: expected a whole number of at least 1, or auto")
    return int(text)


def parse_compile(text: str) -> Any:
    from grafting.errors import GraftError

    known = {"on": True, "off": False, "auto": "auto"}
    if text not in known:
        raise GraftError(f"--compile {text!r}: expected on, off or auto")
    return known[text]


def open_model(
    source: str,
    *,
    num_heads: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    meta: bool = False,
    pipeline: str | None = None,
) -> nn.Module:
    """A model for a command; `meta`: without weights where it has none to lose."""
    from grafting.loading import load_model

    return load_model(
        source,
        num_heads=num_heads,
        device="meta" if meta and source.startswith("arch:") else device,
        dtype=parse_dtype(dtype),
        pipeline=pipeline,
    )


def check_empty(folder: Path) -> None:
    from grafting.errors import RunError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{str(folder)!r} is not an empty folder; give another --out")


def emit(found: Mapping[str, Any]) -> None:
    print(json.dumps(found, indent=2, allow_nan=False))


def show(
    found: Mapping[str, Any], json_: bool, columns: list[tuple[str, ...]] | None = None, rows: str = ""
) -> None:
    """JSON, or the same as a table and lines."""
    if json_:
        emit(found)
        return
    from grafting.report.text import lines, table

    for line in lines({key: value for key, value in found.items() if key != rows}):
        print(line)
    if columns:
        print(table(columns[0], found[rows]))
