"""Images in tables: Parquet files in the layout of the hub's image data sets, and data sets of the hub themselves.

An image column holds structs {bytes, path}; a label column integers, their names in the schema's "huggingface"
metadata. Needs pyarrow, or datasets: `pip install grafting[hub]`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from grafting.data.image_source import fingerprint
from grafting.data.pixels import Skipped
from grafting.errors import DataError

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class")
_MAX_GROUP_BYTES = 4 << 30
_KEPT_GROUPS = 2


def _column(
    given: str | None, known: Sequence[str], held: Sequence[str], what: str, where: str
) -> str | None:
    """The column to use: the one that was named, else the first of the usual names."""
    if given is not None and given not in held:
        raise DataError(f"{where} has no column {given!r}; it has: {', '.join(held)}")
    found = given or next((name for name in known if name in held), None)
    if found is None and what == "image":
        raise DataError(
            f"{where} has no image column (one of {', '.join(known)}); name it with --image-column. "
            f"It has: {', '.join(held)}"
        )
    return found


def _labels(values: Sequence[Any], where: str) -> np.ndarray:
    """int64 labels, -1 for none."""
    try:
        return np.array([-1 if value is None else int(value) for value in values], dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: expected integer labels; name their column with --label-column") from None


class ParquetImages:
    """Images of Parquet files, a row group at a time. Raises `DataError`."""

    kind = "parquet"

    def __init__(
        self, files: Sequence[Path], name: str, image_column: str | None, label_column: str | None
    ) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise DataError("reading .parquet needs pyarrow: pip install 'grafting[hub]'") from None
        self.name = name
        self._files = list(files)
        self.class_names: tuple[str, ...] | None = None
        self._start: list[tuple[int, int, int]] = []  # first index, file, row group
        self._groups: OrderedDict[int, list[Any]] = OrderedDict()
        self._lock = Lock()
        self._image = ""
        labels: list[np.ndarray] = []
        count = 0
        for number, path in enumerate(self._files):
            file = _parquet(path)
            held = file.schema_arrow.names
            self._image = _column(image_column, _IMAGE_COLUMNS, held, "image", str(path)) or ""
            label = _column(label_column, _LABEL_COLUMNS, held, "label", str(path))
            self.class_names = self.class_names or _class_names(file.schema_arrow.metadata, label)
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                if about.total_byte_size > _MAX_GROUP_BYTES:
                    raise DataError(
                        f"{path}: row group {group} claims {about.total_byte_size} bytes, the limit is "
                        f"{_MAX_GROUP_BYTES}; write it again with smaller row groups"
                    )
                self._start.append((count, number, group))
                count += about.num_rows
            labels.append(
                _labels(file.read([label])[label].to_pylist(), f"{path}, column {label!r}")
                if label
                else np.full(file.metadata.num_rows, -1)
            )
        if count == 0:
            raise DataError(f"{name!r} has no rows; check the files")
        self._first = np.array([start for start, _, _ in self._start])
        self.labels = np.concatenate(labels).astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_groups": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()

    def path(self, index: int) -> str:
        start, number, _ = self._start[self._group(index)]
        return f"{self._files[number].name}:{index - start}@{start}"

    def read(self, index: int) -> bytes | Skipped:
        group = self._group(index)
        with self._lock:
            if group not in self._groups:
                _, number, row_group = self._start[group]
                try:
                    table = _parquet(self._files[number]).read_row_group(row_group, columns=[self._image])
                except OSError as error:
                    raise DataError(
                        f"can't read {self._files[number]}: {str(error)[:200]}; download it again"
                    ) from None
                self._groups[group] = table[self._image].to_pylist()
                while len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            cell = self._groups[group][index - self._start[group][0]]
        return _content(cell)

    @property
    def fingerprint(self) -> str:
        lines = [f"{path.name}\t{path.stat().st_size}" for path in self._files]
        return fingerprint([*lines, *(f"{label}" for label in self.labels.tolist())])

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"can't read {path} as Parquet: {reason}; download it again") from None


def _class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> tuple[str, ...] | None:
    """Names of the classes, where the schema has them."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _content(cell: Any) -> bytes | Skipped:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return content
    return Skipped("the row holds no image bytes (paths to other files are not followed)")


class HubImages:
    """A data set of the hub, or a folder that `datasets` wrote. Raises `DataError`."""

    kind = "hub"

    def __init__(self, name: str, split: str, image_column: str | None, label_column: str | None) -> None:
        try:
            import datasets
        except ImportError:
            raise DataError("reading hub data sets needs datasets: pip install 'grafting[hub]'") from None
        self.name = name
        try:
            saved = Path(name)
            if saved.is_dir() and (saved / "state.json").is_file():
                rows = datasets.load_from_disk(name)
            else:
                rows = datasets.load_dataset(name, split=split)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"can't load data set {name!r}, split {split!r}: {reason}; check the name and --split"
            ) from None
        held = rows.column_names
        self._image = _column(image_column, _IMAGE_COLUMNS, held, "image", name) or ""
        label = _column(label_column, _LABEL_COLUMNS, held, "label", name)
        self.class_names = (
            tuple(getattr(rows.features[label], "names", None) or ()) or None if label else None
        )
        self.labels = (
            _labels(rows.with_format(None)[label][:], f"{name}, column {label!r}")
            if label
            else np.full(len(rows), -1, dtype=np.int64)
        )
        if not len(rows):
            raise DataError(f"data set {name!r}, split {split!r}, has no rows; give another --split")
        self._split = split
        self._rows = rows.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return f"{self.name}/{self._split}:{index}"

    def read(self, index: int) -> bytes | Skipped:
        return _content(self._rows[index][self._image])

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.name, self._split, *(f"{label}" for label in self.labels.tolist())])
