"""A safe reader of IDX files, the format of MNIST and its kin (big-endian header, then the raw bytes).

Layout: two zero bytes, a type code, the number of dimensions, one 32-bit size per dimension, the data.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from grafting.errors import DataError

_UBYTE = 0x08
_MAX_DIMS = 4
_MAX_DEFLATE_RATIO = 1040  # deflate cannot expand by more than about 1032


def read_idx(path: str | Path, *, max_bytes: int = 1 << 30) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or raw, as a uint8 array of the shape in its header.

    Every size is checked against `max_bytes` and the size of the file before memory is allocated.
    Raises `DataError` for a missing, truncated, oversized or foreign file.
    """
    path = Path(path)
    try:
        num_on_disk = path.stat().st_size
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _read(raw, path, max_bytes, num_on_disk)
            with gzip.GzipFile(fileobj=raw) as unzipped:
                return _read(cast(IO[bytes], unzipped), path, max_bytes, num_on_disk * _MAX_DEFLATE_RATIO)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the IDX file {path}: {error}; download it again") from error


def _read(file: IO[bytes], path: Path, max_bytes: int, max_available: int) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(f"{path} is not an IDX file: it starts with {magic!r}, expected two zero bytes")
    kind, num_dims = magic[2], magic[3]
    if kind != _UBYTE:
        raise DataError(f"{path} holds IDX type 0x{kind:02x}, expected 0x08 (unsigned bytes)")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise DataError(f"{path} claims {num_dims} dimensions, expected 1 to {_MAX_DIMS}")
    sizes = file.read(4 * num_dims)
    if len(sizes) < 4 * num_dims:
        raise DataError(f"{path} ends inside its header; download it again")
    shape = struct.unpack(f">{num_dims}I", sizes)
    num_bytes = math.prod(shape)  # Python integers: cannot overflow
    if num_bytes > max_bytes:
        raise DataError(
            f"{path} claims shape {shape} = {num_bytes} bytes, more than the limit of {max_bytes}"
        )
    if num_bytes > max_available:
        raise DataError(
            f"{path} claims shape {shape} = {num_bytes} bytes but is too short; download it again"
        )
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        raise DataError(
            f"{path} holds {len(data)} of the {num_bytes} bytes of shape {shape}; download it again"
        )
    if file.read(1):
        raise DataError(f"{path} holds more than the {num_bytes} bytes of shape {shape}; download it again")
    return np.frombuffer(bytearray(data), dtype=np.uint8).reshape(shape)
