"""Webdataset shards: tar files whose members share a key, such as `000/17.jpg` and `000/17.cls`.

Nothing is extracted: headers are read in place, an image by its offset. A member's name is only ever a name in a log;
links, devices and folders in an archive are never followed.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from grafting.data.image_source import fingerprint
from grafting.data.pixels import EXTENSIONS, MAX_FILE_BYTES, Skipped
from grafting.errors import DataError

_BLOCK = 512
_MAX_NAME_BYTES = 1 << 16  # of an extended header, which holds a long name
_MAX_LABEL_BYTES = 1 << 20
_MAX_FILES = 100_000
_LINK = -1  # in place of a size
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_LABEL_KEYS = ("cls", "label")


class Member(NamedTuple):
    """A file in an archive: its name, where its bytes are, how many (-1: not a plain file)."""

    name: str
    offset: int
    size: int


def expand(pattern: str) -> list[Path]:
    """The files of a pattern with `{a..b}`, `{x,y}`, `*`, `?` and `[...]`, in order. Raises `DataError`."""
    found: list[Path] = []
    for text in itertools.islice(_braces(pattern), _MAX_FILES + 1):
        if any(mark in text for mark in "*?[") and not Path(text).exists():
            matches = sorted(glob.glob(text, recursive=True))
            if not matches:
                raise DataError(f"no file matches {text!r}; check the pattern")
            found += [Path(match) for match in matches]
        else:
            found.append(Path(text))
    if len(found) > _MAX_FILES:
        raise DataError(f"{pattern!r} stands for more than {_MAX_FILES} files; give a narrower pattern")
    for path in found:
        if not path.is_file():
            raise DataError(f"no file or folder {str(path)!r}; check the path")
    return found


def _braces(pattern: str) -> Iterator[str]:
    for match in (_RANGE.search(pattern), _LIST.search(pattern)):
        if match is None:
            continue
        if match.re is _LIST:
            choices: Iterator[str] = iter(match[1].split(","))
        else:
            low, high = int(match[1]), int(match[2])
            if high < low:
                raise DataError(f"{pattern!r}: the range {match[0]} is empty; give the smaller number first")
            if high - low >= _MAX_FILES:
                raise DataError(
                    f"{pattern!r} stands for more than {_MAX_FILES} files; give a narrower pattern"
                )
            choices = (str(number).zfill(len(match[1])) for number in range(low, high + 1))
        for choice in choices:
            yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])
        return
    yield pattern


def members(file: IO[bytes], num_bytes: int, where: str) -> Iterator[Member]:
    """The members of an uncompressed tar in order, from their headers alone; extended headers are bounded.

    Raises `DataError` for a damaged header, an absurd size, and an archive that ends before its members do.
    """
    position, name, size = 0, None, None
    while position < num_bytes:
        file.seek(position)
        try:
            header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            if isinstance(error, getattr(tarfile, "EOFHeaderError", ())):
                return  # a block of zeros ends the archive
            raise DataError(
                f"{where} is not a whole, uncompressed tar file (at byte {position}: {error}); unpack .tar.gz to .tar, "
                "or download it again"
            ) from None
        position += _BLOCK
        length = header.size if size is None or header.type in _EXTENDED else size
        end = position + length
        if length < 0 or end > num_bytes:
            raise DataError(
                f"{where}: member {header.name[:100]!r} claims {length} bytes at byte {position} of {num_bytes}; the "
                "file is cut short or damaged, download it again"
            )
        if header.type in _EXTENDED:
            if length > _MAX_NAME_BYTES:
                raise DataError(
                    f"{where}: a header of {length} bytes at byte {position}; the file is damaged"
                )
            name, size = _extended(header.type, file.read(length), name, size)
        else:
            is_file = header.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            if header.type != tarfile.DIRTYPE:
                yield Member(name or header.name, position, length if is_file else _LINK)
            if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
                end = position  # these have no data, whatever their size says
            name = size = None
        position += -(-(end - position) // _BLOCK) * _BLOCK


_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def _extended(
    kind: bytes, content: bytes, name: str | None, size: int | None
) -> tuple[str | None, int | None]:
    """Name and size of the member to come, as an extended header gives them."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape"), size
    if kind == tarfile.XHDTYPE:  # records "LENGTH key=value\n"
        for record in re.finditer(rb"\d+ (path|size)=([^\n]*)\n", content):
            if record[1] == b"path":
                name = record[2].decode("utf-8", "surrogateescape")
            elif record[2].isdigit() and len(record[2]) < 20:
                size = int(record[2])
    return name, size


class TarImages:
    """Images of webdataset shards: a member `KEY.jpg` (.jpeg, .png, .webp) with its label in `KEY.cls` or `KEY.json`.

    The label is the number in `.cls`, or `cls` or `label` of the JSON object. Members of a sample follow each
    other, as webdataset demands. Raises `DataError` for damaged archives.
    """

    kind = "webdataset"
    class_names: tuple[str, ...] | None = None

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name = name
        self._files = list(files)
        self._names: list[str] = []
        rows: list[tuple[int, int, int, int]] = []  # file, offset, size, label
        for number, path in enumerate(self._files):
            try:
                with path.open("rb") as file:
                    num_bytes = path.stat().st_size
                    for image, label in _samples(file, num_bytes, str(path)):
                        self._names.append(image.name)
                        rows.append((number, image.offset, image.size, label))
            except OSError as error:
                raise DataError(f"can't read {str(path)!r}: {error.strerror}; check the file") from None
        if not rows:
            raise DataError(
                f"{self.name!r}: no images in {len(self._files)} tar files; expected members that end in "
                f"{', '.join(EXTENSIONS)}"
            )
        table = np.array(rows, dtype=np.int64)
        self._file, self._offset, self._size = table[:, 0], table[:, 1], table[:, 2]
        self.labels = table[:, 3].copy()

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> str:
        name = self._names[index].encode("utf-8", "backslashreplace").decode()
        return f"{self._files[self._file[index]].name}:{name}"

    def read(self, index: int) -> bytes | Skipped:
        path, size = self._files[self._file[index]], int(self._size[index])
        if size == _LINK:
            return Skipped("a link or special file in the archive, which is not followed")
        if size > MAX_FILE_BYTES:
            return Skipped(f"the file has {size} bytes, the limit is {MAX_FILE_BYTES}")
        try:
            with path.open("rb") as file:
                file.seek(int(self._offset[index]))
                return file.read(size)
        except OSError as error:
            raise DataError(
                f"can't read {str(path)!r}: {error.strerror}; make it readable and start again, what is encoded is kept"
            ) from None

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            f"{self.path(i)}\t{self._offset[i]}\t{self._size[i]}\t{self.labels[i]}" for i in range(len(self))
        )


def _samples(file: IO[bytes], num_bytes: int, where: str) -> Iterator[tuple[Member, int]]:
    """(image, label) of every sample that has an image."""
    for _, group in itertools.groupby(members(file, num_bytes, where), key=lambda m: _key(m.name)[0]):
        image, label = None, -1
        for member in group:
            ending = _key(member.name)[1]
            if f".{ending}" in EXTENSIONS and image is None:
                image = member
            elif ending in ("cls", "json") and label < 0 and 0 <= member.size <= _MAX_LABEL_BYTES:
                file.seek(member.offset)
                label = _label(file.read(member.size), ending, f"{where}: {member.name[:100]!r}")
        if image is not None:
            yield image, label


def _key(name: str) -> tuple[str, str]:
    """Webdataset's split of a member's name at the first dot of its last part: (key, ending)."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}{slash}{stem}", ending.rpartition(".")[2].lower()


def _label(content: bytes, ending: str, where: str) -> int:
    value: object = None
    if ending == "cls":
        text = content.strip()
        value = int(text) if text.isdigit() and len(text) < 10 else text[:40].decode("utf-8", "replace")
    else:
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {str(error)[:100]}; repair the shard") from None
        if isinstance(data, dict):
            value = next((data[key] for key in _LABEL_KEYS if key in data), None)
            if value is None:
                return -1
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise DataError(
            f"{where}: label {value!r}, expected a class number such as 0 or 999; repair the shard"
        )
    return value
