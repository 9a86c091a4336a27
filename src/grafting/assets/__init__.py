"""Files that ship with the package: small data sets, reference statistics and weights."""

from __future__ import annotations

from pathlib import Path

from grafting.errors import DataError


def asset_path(name: str) -> Path:
    """Return the path of the shipped file `name`; `DataError` if this installation lacks it."""
    path = Path(__file__).resolve().parent / name
    if not path.is_file():
        raise DataError(
            f"packaged file {name!r} is missing from {path.parent}: the installation is incomplete; "
            "reinstall grafting, or rebuild it with scripts/build_fashion_assets.py"
        )
    return path
