"""Classes of samples as a user gives them: numbers or a file, checked, and named for the protocol."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grafting.errors import DataError

_FILES = (".npy", ".npz", ".txt")
_NUMBERS = re.compile(r"\s*\d{1,9}(\s*[,\s]\s*\d{1,9})*\s*,?\s*")
_SPELLED_OUT = 20  # labels that a protocol holds as they are; of more it holds a hash
_MAX_BYTES = 1 << 28


def read_labels(given: str, num: int) -> np.ndarray:
    """Labels [num] of `--labels`: numbers with commas between them, repeated up to num, or a file with one a sample.

    A .npz is read as sample files are, from `arr_1`, or else from its only array. Raises DataError.
    """
    if Path(given).suffix in _FILES:
        return check_labels(_read_file(Path(given)), num, where=f"--labels {given}")
    if not _NUMBERS.fullmatch(given):
        raise DataError(
            f"--labels {given[:60]!r}: expected numbers of classes such as 3,5,7, or a file ({', '.join(_FILES)})"
        )
    labels = np.array(_split(given))
    if len(labels) > num:
        raise DataError(
            f"--labels: {len(labels)} labels for {num} images; give --num {len(labels)}, or fewer"
        )
    return np.resize(labels, num)


def check_labels(
    labels: Sequence[int] | np.ndarray | Any, num: int, classes: int | None = None, where: str = "labels"
) -> np.ndarray:
    """Labels as int64 [num], one an image, each below the number of classes. Raises DataError."""
    try:
        found = np.asarray(labels)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where}: expected {num} whole numbers: {error}") from None
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise DataError(
            f"{where}: expected {num} whole numbers, got an array of {found.dtype}, shape {list(found.shape)}"
        )
    if len(found) != num:
        raise DataError(f"{where}: {len(found)} labels for {num} images; give one for each")
    wrong = found[(found < 0) | (found >= classes)] if classes is not None else found[found < 0]
    if len(wrong):
        below = f"0 to {classes - 1}" if classes is not None else "at least 0"
        raise DataError(f"{where}: there is no class {wrong[0]}: classes of this model are {below}")
    return found.astype(np.int64)


def name_labels(labels: np.ndarray, classes: int) -> str:
    """What a protocol says of them: the same for the same labels, however they were given."""
    if np.array_equal(labels, np.arange(len(labels)) % classes):
        return f"i mod {classes}"
    if len(labels) <= _SPELLED_OUT:
        return ", ".join(map(str, labels.tolist()))
    return f"sha256 {hashlib.sha256(labels.astype('<i8').tobytes()).hexdigest()}"


def _split(text: str) -> list[int]:
    return [int(word) for word in re.split(r"[,\s]+", text) if word]


def _read_file(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"--labels {path}: larger than {_MAX_BYTES} bytes; expected one number a sample")
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            if not _NUMBERS.fullmatch(text):
                raise DataError(f"--labels {path}: expected whole numbers, one a line")
            return np.array(_split(text))
        with path.open("rb") as file:  # numpy leaves a file open that is no archive
            return _one_array(np.load(file, allow_pickle=False), path)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"--labels: can't read {str(path)!r}: {error}") from None


def _one_array(loaded: Any, path: Path) -> Any:
    """Of a .npz its labels; what is not one is taken as it is."""
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        names = loaded.files
        if "arr_1" not in names and len(names) != 1:
            raise DataError(f"--labels {path}: expected arr_1 or one array, got {', '.join(names)[:100]}")
        return loaded["arr_1" if "arr_1" in names else names[0]]
