"""Where the images come from: folders here, tar shards, Parquet and hub datasets in modules of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from grafting.data.image_source import ImageSource, fingerprint
from grafting.data.pixels import EXTENSIONS, MAX_FILE_BYTES, Skipped
from grafting.errors import DataError

HUB = "hub:"


class ImageFolder:
    """A folder with one sub-folder per class (ImageNet's layout), or a flat folder of images without labels.

    Classes are the sub-folders in sorted order; the images of a class may lie in folders below it. Files are sorted by
    their path. Raises `DataError` for a folder without images, images beside class folders, and symbolic links that
    lead out of the folder, unless `follow_links`.
    """

    kind = "folder"

    def __init__(self, root: str | Path, *, follow_links: bool = False) -> None:
        self.root = Path(root)
        self.name = self.root.resolve().name
        self._follow = follow_links
        self._real = os.path.realpath(self.root)
        loose, folders = self._listing(self.root)
        found: list[tuple[str, int, int]] = []
        classes = [(name, self._walk(self.root / name, name)) for name in folders]
        empty = [name for name, files in classes if not files]
        if empty and len(empty) < len(classes):
            raise DataError(
                f"folder {str(self.root / empty[0])!r} has no images; every sub-folder is a class and is numbered: "
                "remove it, or fill it"
            )
        classes = [] if empty else classes
        if classes and loose:
            raise DataError(
                f"folder {str(self.root)!r} has {len(loose)} images (first {loose[0][0]!r}) beside {len(classes)} "
                "folders of classes; move them into a class folder"
            )
        for number, (_, files) in enumerate(classes):
            found += [(path, size, number) for path, size in files]
        if not classes:
            found = [(path, size, -1) for path, size in loose]
        if not found:
            raise DataError(
                f"folder {str(self.root)!r} has no images: expected a sub-folder per class with files that end in "
                f"{', '.join(EXTENSIONS)}, or such files"
            )
        self.class_names = tuple(name for name, _ in classes) or None
        self._paths = [path for path, _, _ in found]
        self._sizes = np.array([size for _, size, _ in found], dtype=np.int64)
        self.labels = np.array([label for _, _, label in found], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes | Skipped:
        path = self.root / self._paths[index]
        try:
            with path.open("rb") as file:
                return file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise DataError(
                f"can't read {str(path)!r}: {error.strerror}; make it readable (or move it away and begin anew) and "
                "start again, what is encoded is kept"
            ) from None

    @property
    def fingerprint(self) -> str:
        rows = zip(self._paths, self._sizes.tolist(), self.labels.tolist(), strict=True)
        return fingerprint(f"{path}\t{size}\t{label}" for path, size, label in rows)

    def _walk(self, folder: Path, prefix: str) -> list[tuple[str, int]]:
        """Images below a class folder, sorted by path: (path from the root, bytes)."""
        files, folders = self._listing(folder)
        found = [(f"{prefix}/{name}", size) for name, size in files]
        for name in folders:
            found += self._walk(folder / name, f"{prefix}/{name}")
        return sorted(found)

    def _listing(self, folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
        """Images (name, bytes) and sub-folders right below a folder; hidden ones are left out."""
        files, folders = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink():
                        self._check_link(entry)
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                        files.append((entry.name, entry.stat().st_size))
        except OSError as error:
            raise DataError(
                f"can't list the folder {str(folder)!r}: {error.strerror}; check the path"
            ) from None
        return sorted(files), sorted(folders)

    def _check_link(self, entry: os.DirEntry[str]) -> None:
        target = os.path.realpath(entry.path)
        inside = target.startswith(self._real + os.sep)
        is_above = (os.path.realpath(os.path.dirname(entry.path)) + os.sep).startswith(target + os.sep)
        if is_above:
            raise DataError(
                f"{entry.path!r} is a symbolic link to a folder that it lies in ({target!r}); remove it"
            )
        if not inside and not self._follow:
            raise DataError(
                f"{entry.path!r} is a symbolic link out of the folder, to {target!r}; give --follow-links if you trust "
                "what it points to, or remove it"
            )


def _unused(source: str, options: Mapping[str, object]) -> None:
    """Raise DataError that names the first option that was given and means nothing to this kind of source."""
    for option, value in options.items():
        if value:
            raise DataError(f"{option} means nothing to what {source!r} holds; leave it out")


def open_images(
    source: str | Path,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    follow_links: bool = False,
) -> ImageSource:
    """Open a source of labelled images by what it is.

    - a folder of class folders, or of images;
    - webdataset shards: a `.tar`, a pattern (`data/{0000..0099}.tar`, `data/*.tar`), or a folder of `.tar` files;
    - a `.parquet` file, a pattern, or a folder of them (needs pyarrow);
    - `hub:OWNER/NAME`: a dataset of the hub (needs datasets), its `split`.
    `image_column` and `label_column` are for the last two, `follow_links` for the first. Raises `DataError`.
    """
    from grafting.data.tables import HubImages, ParquetImages
    from grafting.data.tars import TarImages, expand

    text = str(source)
    columns = {"--image-column": image_column, "--label-column": label_column}
    if text.startswith(HUB):
        _unused(text, {"--follow-links": follow_links})
        return HubImages(text.removeprefix(HUB), split, image_column, label_column)
    path = Path(text)
    if path.is_dir():
        for ending in (".tar", ".parquet"):
            held = sorted(p for p in path.iterdir() if p.name.endswith(ending))
            if held and ending == ".tar":
                _unused(text, {**columns, "--follow-links": follow_links})
                return TarImages(held, path.resolve().name)
            if held:
                _unused(text, {"--follow-links": follow_links})
                return ParquetImages(held, path.resolve().name, image_column, label_column)
        _unused(text, columns)
        return ImageFolder(path, follow_links=follow_links)
    files = expand(text)
    kinds = {file.suffix for file in files}
    name = Path(text).stem
    if kinds == {".tar"}:
        _unused(text, {**columns, "--follow-links": follow_links})
        return TarImages(files, name)
    if kinds == {".parquet"}:
        _unused(text, {"--follow-links": follow_links})
        return ParquetImages(files, name, image_column, label_column)
    raise DataError(
        f"can't tell what images {text!r} holds: expected a folder, .tar or .parquet files (patterns such as "
        "data/{0000..0099}.tar are fine), or hub:OWNER/NAME; unpack .tar.gz to .tar first"
    )
