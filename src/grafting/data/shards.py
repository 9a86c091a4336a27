"""Shards of latents on disk: safetensors files that are written whole, checked by their header, and memory-mapped.

A shard holds `y` int64 [n] labels, `index` int64 [n] numbers of the source images, `x` [n, C, H, W] scaled latents in
float16, bfloat16 or float32, and with flips `x_flip`, those of the mirrored images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grafting.errors import DataError

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 1 << 20
_MAX_TENSORS = 16
_PIECE = 1 << 24
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: type, shape and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def layout(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, from its header, every size checked against the file.

    Raises `DataError` for a missing, truncated or damaged file, another type, and sizes that do not add up.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            credible = 2 <= length <= min(_MAX_HEADER, num_bytes - 8)
            raw = json.loads(file.read(length)) if credible else None
    except OSError as error:
        raise DataError(f"can't read the shard {path}: {error.strerror}; check the folder") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no shard of latents: its header is damaged ({str(error)[:80]})") from None
    found, total = {}, 0
    if raw is None:
        raise DataError(f"{path} is no shard of latents: its header has no credible length")
    if not isinstance(raw, dict) or len(raw) > _MAX_TENSORS:
        raise DataError(f"{path} is no shard of latents: expected at most {_MAX_TENSORS} tensors")
    for name, about in raw.items():
        if name == "__metadata__":
            continue
        entry = _entry(about)
        if entry is None or entry.end > num_bytes - 8 - length or (8 + length) % entry.dtype.itemsize:
            raise DataError(f"{path}: tensor {name[:40]!r} has a type, shape or place that can't be")
        found[name] = Entry(entry.dtype, entry.shape, entry.start + 8 + length, entry.end + 8 + length)
        total += entry.end - entry.start
    if total != num_bytes - 8 - length:
        raise DataError(f"{path} has {num_bytes - 8 - length} bytes of data, its header describes {total}")
    return found


def _entry(about: object) -> Entry | None:
    if not isinstance(about, dict):
        return None
    dtype, shape, offsets = DTYPES.get(str(about.get("dtype"))), about.get("shape"), about.get("data_offsets")
    if dtype is None or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return None
    if len(shape) > 4 or any(type(n) is not int or not 0 <= n < 2**40 for n in [*shape, *offsets]):
        return None
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize or start % dtype.itemsize:  # also: not aligned
        return None
    return Entry(dtype, tuple(shape), start, end)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file as views of a private memory map: read-only by convention, paged in as they are used."""
    entries = layout(path)
    size = path.stat().st_size
    try:
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise DataError(f"can't map {path} into memory: {str(error).splitlines()[0][:160]}") from None
    return {
        name: whole[entry.start : entry.end].view(entry.dtype).view(entry.shape)
        if entry.end > entry.start
        else torch.empty(entry.shape, dtype=entry.dtype)
        for name, entry in entries.items()
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write a safetensors file whole or not at all; returns its size in bytes and its SHA-256."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned

    def pieces() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for tensor in tensors.values():
            if tensor.numel() == 0:
                continue
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            for piece in flat.split(_PIECE):
                yield piece.numpy().data

    return write_whole(path, pieces())


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file whole or not at all (temporary file, fsync, rename); returns its size and SHA-256.

    Raises `DataError` where the disk is full or the folder can't be written.
    """
    partial = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.partial")
    digest, size = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise DataError(
            f"can't write {str(path)!r}: {error.strerror or error}; make room or choose another "
            "folder, finished shards are kept"
        ) from None
    return size, digest.hexdigest()


def write_json(path: Path, data: object) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, [(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()])


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from None
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that are no more."""
    for path in folder.glob(".*.*.*.partial"):
        *_, host, pid, _ = path.name.split(".")
        with contextlib.suppress(OSError):
            here = host == _host()
            if not _alive(pid) if here else time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    """This machine, in a form fit for a file name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]
