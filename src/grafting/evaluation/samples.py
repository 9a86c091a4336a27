"""Sample files: `.npz` with arr_0 uint8 [N, H, W, C], arr_1 labels [N], meta a JSON string with the protocol.

ADM's reference files (arrays mu, sigma, mu_s, sigma_s next to arr_0) are read by the same class.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from grafting.data.npz import NpzReader
from grafting.errors import DataError
from grafting.formats import weights

_MAX_META_BYTES = 1 << 22
_MAX_LABEL_BYTES = 1 << 28
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


def to_uint8(x: Tensor) -> np.ndarray:
    """Map x [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C] = clip(127.5 x + 128, 0, 255), truncated."""
    if x.ndim != 4 or not x.is_floating_point():
        raise DataError(f"samples must be floating point [N, C, H, W], got {x.dtype} {list(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise DataError("samples hold values that are not finite; the model or the sampler has diverged")
    levels = (127.5 * x.detach().float() + 128.0).clamp_(0.0, 255.0).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class SampleFile:
    """Images uint8 [N, H, W, C] with labels [N] or None, their protocol, and statistics if the file has some.

    `SampleFile.open(path)` reads headers, labels and protocol; images are streamed by `images(batch_size)`.
    Raises `DataError` for anything that is not such a file; nothing is unpickled.
    """

    def __init__(
        self,
        images: np.ndarray | NpzReader,
        labels: np.ndarray | None,
        protocol: Mapping[str, Any],
        *,
        name: str = "samples",
        statistics: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._images = images
        self.name = name
        self.labels = labels
        self.protocol = dict(protocol)
        self.statistics = dict(statistics or {})
        header = images.header("arr_0") if isinstance(images, NpzReader) else images
        if header.dtype != np.uint8 or len(header.shape) != 4 or 0 in header.shape:
            raise DataError(
                f"{name}: images must be uint8 [N, H, W, C], got {header.dtype} {list(header.shape)}; "
                "write them with grafting.evaluation.samples.write_samples"
            )
        self.num_samples = int(header.shape[0])
        self.image_shape = (int(header.shape[1]), int(header.shape[2]), int(header.shape[3]))
        if labels is not None:
            _check_labels(labels, self.num_samples, name)

    @classmethod
    def open(cls, path: str | Path) -> SampleFile:
        """Open a sample file, or an ADM reference file, for reading."""
        archive = NpzReader(path)
        name = Path(path).stem
        archive.header("arr_0")  # an error that lists what is there if it is not
        labels = None
        if "arr_1" in archive:
            labels = archive.read("arr_1", max_bytes=_MAX_LABEL_BYTES)
            _check_labels(labels, archive.header("arr_0").shape[0], name)
            labels = labels.astype(np.int64)
        statistics = {key: archive.read(key) for key in _STATISTICS if key in archive}
        return cls(archive, labels, _protocol(archive), name=name, statistics=statistics)

    def __len__(self) -> int:
        return self.num_samples

    def images(self, batch_size: int = 256) -> Iterator[np.ndarray]:
        """Yield the images in order, uint8 [B, H, W, C] at a time."""
        if isinstance(self._images, NpzReader):
            yield from self._images.slices("arr_0", batch_size)
            return
        for start in range(0, self.num_samples, batch_size):
            yield self._images[start : start + batch_size]

    def content_hash(self) -> str:
        """SHA-256 of shape, images, labels and statistics; neither name nor protocol is part of it."""
        digest = hashlib.sha256(f"{self.num_samples} {self.image_shape}".encode())
        for batch in self.images():
            digest.update(np.ascontiguousarray(batch).tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        for key in sorted(self.statistics):
            digest.update(key.encode() + self.statistics[key].astype("<f8").tobytes())
        return digest.hexdigest()


class SampleWriter:
    """Write a sample file batch by batch: `with SampleWriter(path, N, (H, W, C), labels, protocol) as file`.

    The file appears under its name only when all N images are in; the same input gives the same bytes. An error of the
    disk ends the block with CheckpointError, and nothing of the file is left.
    """

    def __init__(
        self,
        path: str | Path,
        num_samples: int,
        image_shape: tuple[int, int, int],
        labels: np.ndarray,
        protocol: Mapping[str, Any],
    ) -> None:
        self.path = Path(path)
        self._shape = (num_samples, *image_shape)
        self._num_written = 0
        labels = np.asarray(labels)
        _check_labels(labels, num_samples, str(self.path))
        self._labels = labels.astype(np.int64)
        self._meta = protocol_text(self.path, protocol)
        self._file: IO[bytes] | None = None
        self._whole = self._opened()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        with weights.new_file(self.path) as file:
            archive = zipfile.ZipFile(file, "w")
            self._file = images = archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True)
            try:
                header = {"descr": "|u1", "fortran_order": False, "shape": self._shape}
                np.lib.format.write_array_header_1_0(images, header)
                yield
                if self._num_written < self._shape[0]:
                    raise DataError(f"{self.path}: {self._num_written} of {self._shape[0]} images were given")
                images.close()
                for name, array in (("arr_1", self._labels), ("meta", np.array(self._meta))):
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
                archive.close()
            except BaseException:
                with contextlib.suppress(OSError):  # it writes as it closes, which a full disk refuses
                    images.close()
                with contextlib.suppress(OSError):
                    archive.close()
                raise
            finally:
                self._file = None

    def __enter__(self) -> SampleWriter:
        self._whole.__enter__()
        return self

    def append(self, images: np.ndarray) -> None:
        """Add images uint8 [B, H, W, C]."""
        if images.dtype != np.uint8 or images.shape[1:] != self._shape[1:]:
            raise DataError(f"expected uint8 [B, {self._shape[1:]}], got {images.dtype} {list(images.shape)}")
        if self._file is None or self._num_written + len(images) > self._shape[0]:
            raise DataError(f"{self.path} is closed or full: it was opened for {self._shape[0]} images")
        self._file.write(np.ascontiguousarray(images).tobytes())
        self._num_written += len(images)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._whole.__exit__(kind, error, trace)


def protocol_text(path: Path, protocol: Mapping[str, Any]) -> str:
    """The protocol as it stands in the file `path`. Raises DataError for one that is not plain JSON."""
    try:
        return json.dumps(dict(protocol), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the protocol of {path} is not plain JSON: {error}") from error


def write_samples(
    path: str | Path, images: np.ndarray, labels: np.ndarray, protocol: Mapping[str, Any]
) -> None:
    """Write images uint8 [N, H, W, C] with labels [N] and their protocol, atomically."""
    if images.ndim != 4:
        raise DataError(f"images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    with SampleWriter(path, len(images), shape, labels, protocol) as file:
        file.append(images)


def _check_labels(labels: np.ndarray, num_samples: int, name: str) -> None:
    if labels.dtype.kind not in "iu" or labels.shape != (num_samples,):
        raise DataError(
            f"{name}: labels must be integers [{num_samples}], got {labels.dtype} {list(labels.shape)}"
        )


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _protocol(archive: NpzReader) -> dict[str, Any]:
    if "meta" not in archive:
        return {}
    meta = archive.read("meta", max_bytes=_MAX_META_BYTES)
    if meta.dtype.kind != "U" or meta.ndim != 0:
        raise DataError(f"{archive.path}: meta must be one JSON string, got {meta.dtype} {list(meta.shape)}")
    try:
        protocol = json.loads(str(meta), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{archive.path}: meta is not JSON ({error}); write the samples again") from error
    if not isinstance(protocol, dict):
        raise DataError(f"{archive.path}: meta must be a JSON object, got {type(protocol).__name__}")
    return protocol
