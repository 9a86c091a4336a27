"""A safe reader of `.npz` archives: nothing is unpickled, every size is checked before it is allocated."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from grafting.errors import DataError

_MAX_MEMBERS = 64
_MAX_DEFLATE_RATIO = 1040  # deflate cannot expand by more than about 1032
_HEADER_SLACK = 16384
_MAX_NAME = 200
_MAX_HEADER = 10_000  # of an array: shape and type
_MAX_RATIO, _FREE_BYTES = 200, 1 << 28  # beyond 256 MB, what unpacks to more than 200 times itself is a bomb
_ZIP_ERRORS = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, ValueError, RuntimeError, LookupError,
    OverflowError, MemoryError, TypeError, SyntaxError, AttributeError,
)  # fmt: skip
_KINDS = "buifU"  # bool, integers, floats, text: no objects, no structures


@dataclass(frozen=True)
class ArrayHeader:
    """Shape, type and size of one array of an archive, known without reading its data."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    num_bytes: int


class NpzReader:
    """The arrays of one `.npz` file, read one at a time or in slices along the first axis.

    Opening reads the directory and the headers only. Raises `DataError` for a missing or damaged archive,
    object arrays (pickles), unknown compression, column-major arrays and sizes that do not add up.
    """

    def __init__(self, path: str | Path, *, max_bytes: int = 1 << 36) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        with self._guard(), zipfile.ZipFile(self.path) as archive:
            infos = archive.infolist()
            if len(infos) > _MAX_MEMBERS:
                raise DataError(f"{self.path} holds {len(infos)} arrays, expected at most {_MAX_MEMBERS}")
            self.headers = {header.name: header for header in (self._header(archive, info) for info in infos)}

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def header(self, name: str) -> ArrayHeader:
        """Return the header of array `name`; `DataError` names the arrays that are there if it is not."""
        if name not in self.headers:
            held = ", ".join(sorted(self.headers))[:300] or "nothing"
            raise DataError(f"{self.path} has no array {name!r}; it holds: {held}")
        return self.headers[name]

    def read(self, name: str, *, max_bytes: int = 1 << 34) -> np.ndarray:
        """Read array `name` whole; `DataError` if it is larger than `max_bytes`."""
        header = self.header(name)
        if header.num_bytes > max_bytes:
            raise DataError(
                f"{self.path}: array {name!r} has {header.num_bytes} bytes, the limit is {max_bytes}"
            )
        with self._guard(), zipfile.ZipFile(self.path) as archive, self._data(archive, header) as file:
            return self._rows(file, header, header.shape)

    def slices(self, name: str, num_rows: int) -> Iterator[np.ndarray]:
        """Yield array `name` in order, `num_rows` of its first axis at a time, in bounded memory."""
        header = self.header(name)
        if not header.shape or num_rows < 1:
            raise DataError(
                f"{self.path}: array {name!r} of shape {header.shape} has no slices of {num_rows} rows"
            )
        with self._guard(), zipfile.ZipFile(self.path) as archive, self._data(archive, header) as file:
            for start in range(0, header.shape[0], num_rows):
                rows = min(num_rows, header.shape[0] - start)
                yield self._rows(file, header, (rows, *header.shape[1:]))

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except _ZIP_ERRORS as error:
            raise DataError(
                f"cannot read {self.path} as .npz: {_one_line(error)}; write or download it again"
            ) from error

    def _header(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> ArrayHeader:
        if len(info.filename) > _MAX_NAME:
            raise DataError(f"{self.path} holds a name of {len(info.filename)} characters: it is damaged")
        name = info.filename.removesuffix(".npy")
        where = f"{self.path}: array {name!r}"
        if not info.filename.endswith(".npy"):
            raise DataError(f"{self.path} holds {info.filename!r}, expected .npy arrays only")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{where} is compressed by method {info.compress_type}, expected stored or deflated"
            )
        if info.flag_bits & 1:
            raise DataError(f"{where} is encrypted, expected plain data")
        if info.file_size > self.max_bytes:
            raise DataError(f"{where} claims {info.file_size} bytes, the limit is {self.max_bytes}")
        if info.file_size > info.compress_size * _MAX_DEFLATE_RATIO + _HEADER_SLACK:
            raise DataError(f"{where} claims {info.file_size} bytes out of {info.compress_size} stored ones")
        if info.file_size > max(_FREE_BYTES, info.compress_size * _MAX_RATIO):
            raise DataError(
                f"{where} unpacks {info.compress_size} bytes to {info.file_size}: not data, but a bomb"
            )
        with archive.open(info) as file:
            shape, fortran, dtype = _npy_header(file, where)
            start = file.tell()
        if dtype.hasobject or dtype.kind not in _KINDS:
            raise DataError(
                f"{where} has type {dtype}, expected numbers or text (pickled objects are not read)"
            )
        if fortran and len(shape) > 1:
            raise DataError(f"{where} is column-major, expected row-major; save np.ascontiguousarray of it")
        num_bytes = math.prod(shape) * dtype.itemsize
        if any(size < 0 for size in shape) or num_bytes != info.file_size - start:
            raise DataError(
                f"{where} claims shape {str(shape)[:100]} of {str(dtype)[:40]} "
                f"but has {info.file_size - start} data bytes"
            )
        return ArrayHeader(name, shape, dtype, num_bytes)

    @contextmanager
    def _data(self, archive: zipfile.ZipFile, header: ArrayHeader) -> Iterator[IO[bytes]]:
        with archive.open(f"{header.name}.npy") as file:
            shape, _, dtype = _npy_header(file, f"{self.path}: array {header.name!r}")
            if (shape, dtype) != (header.shape, header.dtype):
                raise DataError(f"{self.path} changed while it was read, at array {header.name!r}")
            yield file

    def _rows(self, file: IO[bytes], header: ArrayHeader, shape: tuple[int, ...]) -> np.ndarray:
        num_bytes = math.prod(shape) * header.dtype.itemsize
        data = bytearray(file.read(num_bytes))
        if len(data) < num_bytes:
            raise DataError(f"{self.path}: array {header.name!r} is cut short; write or download it again")
        return np.frombuffer(data, dtype=header.dtype).reshape(shape)


def _npy_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    magic = file.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY":
        raise DataError(f"{where} has a damaged header: it does not begin as .npy does")
    version = (magic[6], magic[7])
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{where} is of .npy version {version}, expected 1.0 or 2.0")
    size = file.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(size, "little")
    if length > _MAX_HEADER:  # before it is read
        raise DataError(f"{where} has a damaged header: it claims {length} bytes")
    header = io.BytesIO(size + file.read(length))
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about headers of Python 2, and what Python thinks of their syntax
            return read(header)
    except (*_ZIP_ERRORS, tokenize.TokenError) as error:
        raise DataError(f"{where} has a damaged header: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
