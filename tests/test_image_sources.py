"""Where images come from: folders, tar shards, Parquet; and what strangers' files can do, which is nothing."""

from __future__ import annotations

import io
import json
import random
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from latent_tools import CLASSES, config, image_bytes, make_world, save_images

from grafting.data import encode_images, open_images
from grafting.data.pixels import Skipped, decode_image
from grafting.data.tars import expand
from grafting.errors import DataError, GraftError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, twelve images in three classes of which one is cut short, and their latents."""
    return make_world(tmp_path_factory.mktemp("sources"))


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims that many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(64)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"no image at all", "not a JPEG"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
            "not a JPEG",
        ),  # would be given to Ghostscript
        (image_bytes(0, "GIF"), "not a JPEG"),
        (png(60_000, 60_000), "limit"),
        (png(11_000, 11_000), "limit"),
        (png(2, 4_000_000), "limit"),  # a ribbon that would be scaled to 512 million pixels
        (image_bytes(0, "JPEG")[:200], "decoded"),
        (png(30, 30), "decoded"),
    ],
    ids=range(9),
)
def test_files_that_are_no_images_are_refused_with_a_reason(content: bytes, word: str) -> None:
    from grafting.data.pixels import quiet_decoding

    with quiet_decoding():
        found = decode_image(content, 16)
    assert isinstance(found, Skipped)
    assert word in found.reason


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **header: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


def test_webdataset_shards_give_the_latents_of_the_folder(world: Path, tmp_path: Path) -> None:
    paths = sorted((world / "images").rglob("*.*"))
    for number in range(2):
        kind = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[number]
        with tarfile.open(tmp_path / f"s-{number:04d}.tar", "w", format=kind) as archive:
            for path in paths[number * 6 : number * 6 + 6]:
                label = CLASSES.index(path.parent.name)
                key = f"{path.parent.name}/{'long-' * 30}{path.stem}"
                add(archive, f"{key}{path.suffix.lower()}", path.read_bytes())
                if number:
                    add(archive, f"{key}.cls", str(label).encode())
                else:
                    add(archive, f"{key}.json", json.dumps({"label": label}).encode())
    for pattern in ("s-{0000..0001}.tar", "s-*.tar", "{s-0000,s-0001}.tar", ""):
        source = open_images(f"{tmp_path}/{pattern}")
        assert source.kind == "webdataset"
        assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert [source.read(i) for i in range(12)] == [path.read_bytes() for path in paths]
    encode_images(f"{tmp_path}/s-{{0000..0001}}.tar", tmp_path / "z", config(world))
    for name in ("latents-00000.safetensors", "latents-00002.safetensors"):
        assert (tmp_path / "z" / name).read_bytes() == (world / "whole" / name).read_bytes()


def test_links_and_names_that_climb_out_of_an_archive_are_only_names(world: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(image_bytes(0))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "../../etc/climb.png", image_bytes(1))
        add(archive, "/absolute.png", image_bytes(2))
        add(archive, "link.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add(archive, "hard.png", type=tarfile.LNKTYPE, linkname="/absolute.png")
        add(archive, "device.png", type=tarfile.CHRTYPE)
    before = sorted(tmp_path.rglob("*"))
    source = open_images(tmp_path / "a.tar")
    found = [source.read(i) for i in range(len(source))]
    assert found[:2] == [image_bytes(1), image_bytes(2)]
    assert [isinstance(content, Skipped) for content in found] == [False, False, True, True, True]
    assert sorted(tmp_path.rglob("*")) == before
    manifest = encode_images(source, tmp_path / "z", config(world))
    assert manifest is not None
    assert (manifest.num, manifest.num_skipped, manifest.labelled) == (2, 3, False)


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        add(archive, "a.png", image_bytes(0))
        add(archive, "b.png", image_bytes(1))
    whole = buffer.getvalue()
    path = tmp_path / "x.tar"

    def refused(content: bytes, word: str) -> None:
        path.write_bytes(content)
        with pytest.raises(DataError, match=word):
            open_images(path)

    refused(whole[:700], "cut short")
    refused(b"\x1f\x8b" + whole, "uncompressed")
    refused(whole[:600] + b"junk" * 400, "x.tar")
    refused(b"", "no images")
    absurd = tarfile.TarInfo("a.png")
    absurd.size = 1 << 60  # a terabyte and then some, in base 256
    refused(absurd.tobuf(tarfile.GNU_FORMAT), "claims 1152921504606846976 bytes")
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 20
    refused(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20), "a header of 1048576 bytes")
    record = b"30 size=99999999999999999999\n"
    header.size = len(record)
    refused(header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + b"junk" * 256, "x.tar")
    generator = random.Random(0)
    for _ in range(300):  # whatever is flipped: a list of images or one error
        content = bytearray(whole)
        for _ in range(generator.randrange(1, 6)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        try:
            source = open_images(path)
        except GraftError:
            continue
        for index in range(len(source)):
            source.path(index)
            source.read(index)


@pytest.mark.parametrize(
    ("pattern", "word"),
    [("{0003..0001}.tar", "empty"), ("{0..999999999999}.tar", "more than"), ("*.tar", "no file matches"),
     ("{a,b}.tar", "no file or folder"), ("x.tar.gz", "no file")],
)  # fmt: skip
def test_patterns_that_mean_nothing(tmp_path: Path, pattern: str, word: str) -> None:
    with pytest.raises(DataError, match=word):
        expand(f"{tmp_path}/{pattern}")


def test_labels_in_shards_are_numbers(tmp_path: Path) -> None:
    for content, ending in ((b"cat", "cls"), (b"-1", "cls"), (b'{"label": "cat"}', "json"), (b"{", "json")):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            add(archive, "a.png", image_bytes(0))
            add(archive, f"a.{ending}", content)
        with pytest.raises(DataError, match=r"a\.tar: 'a\."):
            open_images(tmp_path / "a.tar")


def test_an_image_without_a_label_among_labelled_ones_is_skipped(world: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(3):
            add(archive, f"{number}.png", image_bytes(number))
            if number != 1:
                add(archive, f"{number}.cls", b"7")
    manifest = encode_images(tmp_path / "a.tar", tmp_path / "z", config(world, num_classes=10))
    assert manifest is not None
    assert (manifest.num, manifest.num_skipped, manifest.num_classes) == (2, 1, 10)
    assert "no label" in (tmp_path / "z" / "skipped.jsonl").read_text()
    with pytest.raises(DataError, match="larger --num-classes"):
        encode_images(tmp_path / "a.tar", tmp_path / "y", config(world, num_classes=7))


def test_links_out_of_a_folder_need_leave(tmp_path: Path) -> None:
    outside = save_images(tmp_path / "outside", per_class=1)
    root = tmp_path / "images"
    (root / "ant").mkdir(parents=True)
    (root / "ant" / "a.png").write_bytes(image_bytes(0))
    (root / "ant" / "b.png").symlink_to(root / "ant" / "a.png")
    assert len(open_images(root)) == 2
    (root / "cow").symlink_to(outside / "cow")
    with pytest.raises(DataError, match=r"cow' is a symbolic link out of the folder.*--follow-links"):
        open_images(root)
    assert len(open_images(root, follow_links=True)) == 3
    (root / "ant" / "up").symlink_to(root)
    with pytest.raises(DataError, match="that it lies in"):
        open_images(root, follow_links=True)


def test_folders_that_are_not_clear(tmp_path: Path, world: Path) -> None:
    with pytest.raises(DataError, match="has no images"):
        open_images(tmp_path)
    save_images(tmp_path / "x", per_class=1)
    (tmp_path / "x" / "loose.png").write_bytes(image_bytes(0))
    with pytest.raises(DataError, match=r"loose\.png.* beside 3 folders"):
        open_images(tmp_path / "x")
    (tmp_path / "x" / "loose.png").rename(tmp_path / "x" / "bee" / "b.png")
    with pytest.raises(DataError, match="lies in the folder of images"):
        encode_images(tmp_path / "x", tmp_path / "x" / "z", config(world))
    (tmp_path / "x" / "bat").mkdir()
    with pytest.raises(DataError, match="bat' has no images; every sub-folder is a class"):
        open_images(tmp_path / "x")
    flat = open_images(tmp_path / "x" / "ant")
    assert flat.labels.tolist() == [-1]
    manifest = encode_images(flat, tmp_path / "z", config(world))
    assert manifest is not None
    assert (manifest.labelled, manifest.num_classes, manifest.class_names) == (False, 1, None)


def test_parquet_files_in_the_hub_s_layout(world: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = sorted((world / "images").rglob("*.*"))
    features = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    for number in range(2):
        part = paths[number * 6 : number * 6 + 6]
        table = pyarrow.table({
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in part],
            "label": [CLASSES.index(path.parent.name) for path in part],
        }).replace_schema_metadata({"huggingface": json.dumps(features)})  # fmt: skip
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
    source = open_images(tmp_path)
    assert (source.kind, source.class_names) == ("parquet", CLASSES)
    assert [source.read(i) for i in range(12)] == [path.read_bytes() for path in paths]
    encode_images(source, tmp_path / "z", config(world))
    shard = "latents-00001.safetensors"
    assert (tmp_path / "z" / shard).read_bytes() == (world / "whole" / shard).read_bytes()


class Rows:
    """As much of `datasets.Dataset` as is used."""

    def __init__(self, columns: dict[str, Any], names: tuple[str, ...]) -> None:
        self._columns, self.column_names = columns, list(columns)
        self.features = {
            name: SimpleNamespace(names=list(names)) if name == "label" else None for name in columns
        }

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}

    def with_format(self, kind: None) -> Rows:
        return self

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: self._columns[name] for name in names}, ())

    def cast_column(self, name: str, feature: Any) -> Rows:
        assert feature == "undecoded"
        return self


def test_a_data_set_of_the_hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for `datasets`, which is not installed with the rest."""
    paths = sorted((world / "images").rglob("*.*"))
    rows = Rows(
        {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
         "label": [CLASSES.index(path.parent.name) for path in paths]}, CLASSES,
    )  # fmt: skip
    rows[3]["image"]["bytes"] = None

    def load(name: str, split: str) -> Rows:
        if (name, split) != ("owner/name", "train"):
            raise ValueError(f"no {name}\nreally")
        return rows

    stand_in = SimpleNamespace(load_dataset=load, Image=lambda decode: None if decode else "undecoded")
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    source = open_images("hub:owner/name")
    assert (source.kind, source.class_names, len(source)) == ("hub", CLASSES, 12)
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    encode_images(source, tmp_path / "z", config(world))
    shard = "latents-00002.safetensors"
    assert (tmp_path / "z" / shard).read_bytes() == (world / "whole" / shard).read_bytes()
    with pytest.raises(DataError, match=r"split 'test': no owner/name really; check the name and --split"):
        open_images("hub:owner/name", split="test")
    with pytest.raises(DataError, match="no column 'picture'; it has: image, label"):
        open_images("hub:owner/name", image_column="picture")


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="needs pyarrow"):
        open_images(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="needs datasets"):
        open_images("hub:owner/name")
